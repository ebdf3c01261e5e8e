"""What sentence-transformers' own files say of a model: modules.json, the modules' folders, how vectors are compared.

Reads no tensors, and runs no class that a file names. Source: sentence-transformers 6.2,
https://sbert.net/docs/package_reference/sentence_transformer/modules.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, only, read_json, rules, shown, whole

PACKAGE = "sentence_transformers."
# The module paths under which the package has a class, its older ones included.
PATHS: Mapping[str, tuple[str, ...]] = {
    "Transformer": (
        *("models", "models.Transformer", "base.modules", "base.modules.transformer"),
        *("sentence_transformer.modules", "cross_encoder.modules"),
    ),
    "Pooling": ("models", "models.Pooling", "sentence_transformer.modules", "sentence_transformer.modules.pooling"),
    "Normalize": (
        *("models", "models.Normalize", "base.modules", "base.modules.normalize"),
        *("sentence_transformer.modules", "sentence_transformer.modules.normalize"),
    ),
    "Dropout": ("models", "models.Dropout", "sentence_transformer.modules", "sentence_transformer.modules.dropout"),
    "LogitScore": ("cross_encoder.modules", "cross_encoder.modules.logit_score"),
}
SERVED = {f"{PACKAGE}{path}.{name}": name for name, paths in PATHS.items() for path in paths}
IGNORED = "Dropout"  # of pooled vectors; does nothing outside training

SPARSE = "of a sparse encoder (SPLADE), whose vectors have a value for each word of the vocabulary"
SEVERAL = "of a multi-vector model (ColBERT), which has a vector for each token"
WORDS = "of a model that looks words up in a table"
NOT_SERVED: Mapping[str, str] = {
    "Asym": "which sends queries and documents through different models",
    "BoW": WORDS,
    "CLIPModel": "which also takes pictures",
    "CNN": "a convolution over the tokens",
    "Dense": "a trained layer after the pooling",
    "HierarchicalTokenPooling": SEVERAL,
    "LSTM": "a recurrent layer over the tokens",
    "LambdaTokenPooling": SEVERAL,
    "LayerNorm": "a trained norm after the pooling",
    "MLMTransformer": SPARSE,
    "MultiVectorMask": SEVERAL,
    "Router": "which sends queries and documents through different models",
    "SparseAutoEncoder": SPARSE,
    "SparseStaticEmbedding": SPARSE,
    "SpladePooling": SPARSE,
    "StaticEmbedding": "a table of token vectors without a transformer (model2vec)",
    "WeightedLayerPooling": "a weighted mean of several layers",
    "WordEmbeddings": WORDS,
    "WordWeights": WORDS,
}
INSTEAD = "Serve it with sentence-transformers, or name a model without it"
ORDERS: Mapping[Task, tuple[tuple[str, ...], ...]] = {
    Task.EMBED: (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")),
    Task.RERANK: (("Transformer",), ("Transformer", "LogitScore")),
}

ENTRY: Mapping[str, Rule] = {
    **rules(HONOURED, ("name", "path", "type")),
    "idx": HARMLESS,  # the list's order counts
    "kwargs": only([], None),
}
POOLING_MODE = "pooling_mode_"
POOLING: Mapping[str, Rule] = {
    **rules(whole(), ("word_embedding_dimension", "embedding_dimension")),  # stated, and read by nothing that follows
    **rules(HONOURED, ("include_prompt", "pooling_mode")),
    **rules(only(False, True, None), (f"{POOLING_MODE}{name}_tokens" for name in ("max", "mean", "weightedmean"))),
    **rules(only(False, True, None), (f"{POOLING_MODE}{name}" for name in ("cls_token", "lasttoken"))),
    f"{POOLING_MODE}mean_sqrt_len_tokens": only(False, True, None),
}
NORMALIZE: Mapping[str, Rule] = {
    "module_input_name": only("sentence_embedding"),
    "module_output_name": only("sentence_embedding", None),
}
LOGIT_SCORE: Mapping[str, Rule] = {
    "true_token_id": whole(0),
    "false_token_id": whole(0, null=True),
    "module_input_name": only("causal_logits"),
}
MODULE_KEYS: Mapping[str, Mapping[str, Rule]] = {
    "Pooling": POOLING,
    "Normalize": NORMALIZE,
    "LogitScore": LOGIT_SCORE,
}

# What `model_type` in config_sentence_transformers.json says of a model for each task.
LIBRARY_TYPES = {Task.EMBED: "SentenceTransformer", Task.RERANK: "CrossEncoder"}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
SENTENCE_TRANSFORMERS: Mapping[Task, Mapping[str, Rule]] = {
    task: {
        **rules(HARMLESS, ("__version__", "keep_in_fp32_modules", "requirements")),
        **rules(HONOURED, ("activation_fn", "default_prompt_name", "prompts")),
        "similarity_fn_name": only(*SIMILARITIES, None),
        "truncate_dim": only(
            None, cure="Remove it, list the size in `matryoshka_dimensions` of config.json, and ask for `dimensions`."
        ),
        "model_type": only(model_type),  # of any other, null too, sentence-transformers takes the transformer alone
    }
    for task, model_type in LIBRARY_TYPES.items()
}
KINDS = {
    Task.EMBED: "an embedding model; name it in EMBED_MODEL instead",
    Task.RERANK: "a reranker; name it in RERANK_MODEL instead",
}


def read_modules(folder: Path, named: str, task: Task, listed: Any) -> dict[str, str]:
    """The modules by class, with their folders.

    Args:
        named: the setting that names the model, for errors.
        listed: what modules.json holds.

    Raises:
        StartupError: a module is not served, or not in this order, or says what is not implemented.
    """
    file = folder / "modules.json"
    if not isinstance(listed, list) or not listed:
        raise StartupError(f"{named}: {file} is no list of modules.")
    for entry in listed:
        check_keys(named, file, entry, ENTRY)
    kinds = [_kind(named, entry) for entry in listed]
    _check_order(named, task, kinds, [entry.get("name") for entry in listed])
    modules = {kind: _path(named, file, entry) for kind, entry in zip(kinds, listed, strict=True) if kind != IGNORED}
    if modules["Transformer"] != "":
        raise StartupError(
            f"{named}: its transformer is in the folder {modules['Transformer']}/, as sentence-transformers wrote it "
            f'before 2021: move the files of that folder up into {folder}, and set its `path` in modules.json to "".'
        )
    for kind, path in modules.items():
        if kind in MODULE_KEYS:
            own = folder / path / "config.json"
            check_keys(named, own, read_json(named, own), MODULE_KEYS[kind])
    return modules


def _kind(named: str, entry: Mapping[str, Any]) -> str:
    """The class of a module; its whole path counts, since anybody's class may have the same last name."""
    full = entry.get("type")
    if not isinstance(full, str):
        raise StartupError(f"{named}: modules.json has a module without a `type`.")
    if full in SERVED:
        return SERVED[full]
    last = full.rsplit(".", 1)[-1]
    if not full.startswith(PACKAGE):
        raise StartupError(
            f"{named}: modules.json has the class {full}, which is not sentence-transformers' own, and no code of a "
            f"checkpoint is run. {INSTEAD}."
        )
    what = f", {NOT_SERVED[last]}" if last in NOT_SERVED else ""
    served = ", ".join(name for name in PATHS if name != IGNORED)
    raise StartupError(f"{named}: modules.json has {full}{what}; served are {served}. {INSTEAD}.")


def _check_order(named: str, task: Task, kinds: Sequence[str], names: Sequence[Any]) -> None:
    order = tuple(kind for kind in kinds if kind != IGNORED)
    if task is Task.EMBED and "LogitScore" in order:
        raise StartupError(f"{named}: this is {KINDS[Task.RERANK]}.")
    if task is Task.RERANK and "Pooling" in order:
        raise StartupError(f"{named}: this is {KINDS[Task.EMBED]}.")
    if task is Task.EMBED and "Pooling" not in order:
        raise StartupError(f"{named}: modules.json has no Pooling, so it gives no one vector per text.")
    early = IGNORED in kinds and "Pooling" in kinds[kinds.index(IGNORED) :]
    if order not in ORDERS[task] or early:
        possible = " or ".join(", ".join(order) for order in ORDERS[task])
        raise StartupError(f"{named}: modules.json has {', '.join(kinds)}; supported, in this order: {possible}.")
    if len(set(map(str, names))) < len(names):  # a later module would take the place of one before it
        raise StartupError(f"{named}: two modules in modules.json have the same `name`: number them.")


def _path(named: str, file: Path, entry: Mapping[str, Any]) -> str:
    path = entry.get("path", "")
    if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise StartupError(f"{named}: {file.name} has the path {shown(path)}, which is no folder of the model.")
    return path


def pooling_modes(config: Mapping[str, Any]) -> list[str]:
    """The modes that a Pooling's config.json asks for, under sentence-transformers' newer names."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return [str(name) for name in mode] if isinstance(mode, list) else [str(mode)]
    old = {
        key.removeprefix(POOLING_MODE).removesuffix("_tokens").removesuffix("_token"): value
        for key, value in config.items()
        if key.startswith(POOLING_MODE)
    }
    return [name for name, value in old.items() if value] or ["mean"]


def check_sentence_transformers(named: str, file: Path, config: Mapping[str, Any], task: Task) -> None:
    """config_sentence_transformers.json.

    Raises:
        StartupError: it is of a model for another task, or a key is not known or not implemented.
    """
    for other, model_type in LIBRARY_TYPES.items():
        if other is not task and config.get("model_type") == model_type:
            raise StartupError(f"{named}: this is {KINDS[other]}.")
    check_keys(named, file, config, SENTENCE_TRANSFORMERS[task])
