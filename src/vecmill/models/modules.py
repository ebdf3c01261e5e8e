"""What sentence-transformers' own files say of a model: modules.json, the modules' folders, how vectors are compared.

Reads no tensors, and runs no class that a file names. Source: sentence-transformers 6.2,
https://sbert.net/docs/package_reference/sentence_transformer/modules.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, only, read_json, rules, shown, unsupported, whole

MODULES = "modules.json"
PACKAGE = "sentence_transformers."
# The module paths under which the package has a class, its older ones included.
PATHS: Mapping[str, tuple[str, ...]] = {
    "Transformer": (
        *("models", "models.Transformer", "base.modules", "base.modules.transformer"),
        *("sentence_transformer.modules", "cross_encoder.modules"),
    ),
    "StaticEmbedding": (
        *("models", "models.StaticEmbedding", "sentence_transformer.modules"),
        "sentence_transformer.modules.static_embedding",
    ),
    "Pooling": ("models", "models.Pooling", "sentence_transformer.modules", "sentence_transformer.modules.pooling"),
    "Dense": (
        *("models", "models.Dense", "base.modules", "base.modules.dense"),
        *("sentence_transformer.modules", "cross_encoder.modules"),
    ),
    "LayerNorm": (
        *("models", "models.LayerNorm", "sentence_transformer.modules"),
        "sentence_transformer.modules.layer_norm",
    ),
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
    "HierarchicalTokenPooling": SEVERAL,
    "LSTM": "a recurrent layer over the tokens",
    "LambdaTokenPooling": SEVERAL,
    "MLMTransformer": SPARSE,
    "MultiVectorMask": SEVERAL,
    "Router": "which sends queries and documents through different models",
    "SparseAutoEncoder": SPARSE,
    "SparseStaticEmbedding": SPARSE,
    "SpladePooling": SPARSE,
    "WeightedLayerPooling": "a weighted mean of several layers",
    "WordEmbeddings": WORDS,
    "WordWeights": WORDS,
}
INSTEAD = "Serve it with sentence-transformers, or name a model without it"
HEADS = ("Dense", "LayerNorm", "Normalize")
"""What a vector, or each token's, may go through, in any number and order."""
ORDER = "Transformer and Pooling, or StaticEmbedding, and any of Dense, LayerNorm and Normalize"
STATIC = "StaticEmbedding"
RERANK_ORDERS = (("Transformer",), ("Transformer", "LogitScore"))
RERANK_ORDER = (
    "Transformer; or Transformer, LogitScore; or Transformer and Pooling, and any of Dense, LayerNorm and Normalize, "
    'the last of all a Dense with `module_output_name`: "scores"'
)

ENTRY: Mapping[str, Rule] = {
    **rules(HONOURED, ("name", "path", "type")),
    "idx": HARMLESS,  # the list's order counts
    "kwargs": only([], None),
}
OWN_ENTRY: Mapping[str, Rule] = {**ENTRY, "kwargs": only([], ["task"], None)}
"""Of a class of the checkpoint's own, which may be told a text's task."""
LONGEST_NAME = 255
"""Bytes of a folder's name."""
POOLING_MODE = "pooling_mode_"
POOLING: Mapping[str, Rule] = {
    **rules(whole(), ("word_embedding_dimension", "embedding_dimension")),  # stated, and read by nothing that follows
    **rules(HONOURED, ("include_prompt", "pooling_mode")),
    **rules(only(False, True, None), (f"{POOLING_MODE}{name}_tokens" for name in ("max", "mean", "weightedmean"))),
    **rules(only(False, True, None), (f"{POOLING_MODE}{name}" for name in ("cls_token", "lasttoken"))),
    f"{POOLING_MODE}mean_sqrt_len_tokens": only(False, True, None),
}
SENTENCE, TOKENS, SCORES = "sentence_embedding", "token_embeddings", "scores"
NORMALIZE: Mapping[str, Rule] = {
    "module_input_name": only(SENTENCE, TOKENS),
    "module_output_name": only(SENTENCE, TOKENS, None),
}
# The classes of torch.nn that can be made without arguments and take a vector; sentence-transformers imports no others.
ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid"),
    *("LogSoftmax", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softmax", "Softmin"),
    *("Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
)
IDENTITY, HALVING = "Identity", "GLU"
ACTIVATION_PATHS: Mapping[str, str] = {
    **{f"torch.nn.{part}{name}": name for name in ACTIVATIONS for part in ("", "modules.", "modules.activation.")},
    **{f"torch.nn.{part}{IDENTITY}": IDENTITY for part in ("", "modules.", "modules.linear.")},
}
"""The names that a Dense's `activation_function` may have, to the class in torch.nn."""
DEFAULT_ACTIVATION = "torch.nn.modules.activation.Tanh"
DENSE: Mapping[str, Rule] = {
    **NORMALIZE,
    "module_output_name": only(SENTENCE, TOKENS, SCORES, None),
    **rules(whole(), ("in_features", "out_features")),
    **rules(only(False, True), ("bias", "use_residual")),
    "activation_function": Rule(
        lambda value: isinstance(value, str) and value in ACTIVATION_PATHS,
        f"a class of torch.nn by its path ({', '.join((*ACTIVATIONS, IDENTITY))})",
        "Functions and classes of others would be code of the checkpoint, in whose place sentence-transformers takes "
        "Tanh.",
    ),
}
LAYER_NORM: Mapping[str, Rule] = {"dimension": whole()}
LOGIT_SCORE: Mapping[str, Rule] = {
    "true_token_id": whole(0),
    "false_token_id": whole(0, null=True),
    "module_input_name": only("causal_logits"),
}
MODULE_KEYS: Mapping[str, Mapping[str, Rule]] = {
    "Pooling": POOLING,
    "Normalize": NORMALIZE,
    "Dense": DENSE,
    "LayerNorm": LAYER_NORM,
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


@dataclass(frozen=True, slots=True)
class Head:
    """A Dense, LayerNorm or Normalize."""

    kind: str
    path: str
    """Its folder, relative to the checkpoint's."""
    config: Mapping[str, Any]

    @property
    def input_name(self) -> str:
        """What it changes: each token's vector, or the pooled one."""
        return str(self.config.get("module_input_name", SENTENCE))

    @property
    def gives_scores(self) -> bool:
        """Whether it ends a reranker: what it gives are its scores."""
        return self.config.get("module_output_name") == SCORES

    @property
    def trained(self) -> bool:
        """Whether it has weights."""
        return self.kind != "Normalize"

    @property
    def activation(self) -> str:
        """Of a Dense: the name of a class in torch.nn."""
        return ACTIVATION_PATHS[self.config.get("activation_function", DEFAULT_ACTIVATION)]

    @property
    def takes(self) -> int | None:
        """The width of its input; None: any."""
        return self.config.get("in_features" if self.kind == "Dense" else "dimension")

    def width(self, width: int) -> int:
        """The width of what it gives for an input of this width."""
        if self.kind != "Dense":
            return width
        out_features = int(self.config["out_features"])
        return out_features // 2 if self.activation == HALVING else out_features


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a checkpoint, checked."""

    folders: Mapping[str, str]
    """Of the Transformer or StaticEmbedding, the Pooling and the LogitScore, by class."""
    of_tokens: tuple[Head, ...] = ()
    """What each token's vector goes through before the pooling."""
    of_vectors: tuple[Head, ...] = ()
    """What the pooled vector goes through."""

    @property
    def score(self) -> bool:
        """Whether they make the score of a pair of a pooled vector, and no head of the transformer's own does."""
        return bool(self.of_vectors) and self.of_vectors[-1].gives_scores

    @property
    def paths(self) -> list[str]:
        """The folders of all of them."""
        return [*self.folders.values(), *(head.path for head in (*self.of_tokens, *self.of_vectors))]


NO_MODULES = Modules({})
NO_CLASSES: Mapping[str, str] = {}


def read_modules(folder: Path, named: str, task: Task, listed: Any, own: Mapping[str, str] = NO_CLASSES) -> Modules:
    """The modules and their folders.

    Args:
        named: the setting that names the model, for errors.
        listed: what modules.json holds.
        own: classes of the checkpoint's own that are implemented here, to those of the package that they stand for.

    Raises:
        StartupError: a module is not served, or not in this order, or says what is not implemented.
    """
    file = folder / "modules.json"
    if not isinstance(listed, list) or not listed:
        raise StartupError(f"{named}: {file} is no list of modules.")
    for entry in listed:
        is_own = isinstance(entry, Mapping) and str(entry.get("type")) in own
        check_keys(named, file, entry, OWN_ENTRY if is_own else ENTRY)
    kinds = [_kind(named, entry, own) for entry in listed]
    paths = [_path(named, file, entry) for entry in listed]
    modules = [(kind, path) for kind, path in zip(kinds, paths, strict=True) if kind != IGNORED]
    scoring = [_gives_scores(named, folder, kind, path) for kind, path in modules]
    _check_order(named, task, kinds, [entry.get("name") for entry in listed], scoring)
    folders = {kind: path for kind, path in modules if kind not in HEADS}
    if folders.get("Transformer"):
        raise StartupError(
            f"{named}: its transformer is in the folder {folders['Transformer']}/, as sentence-transformers wrote it "
            f'before 2021: move the files of that folder up into {folder}, and set its `path` in modules.json to "".'
        )
    configs = [_checked_config(named, folder, kind, path) for kind, path in modules]
    heads = [
        (place, _head(named, folder, kind, path, config))
        for place, ((kind, path), config) in enumerate(zip(modules, configs, strict=True))
        if kind in HEADS
    ]
    pooling = [kind for kind, _ in modules].index("Pooling") if "Pooling" in folders else 0
    return Modules(
        folders,
        # As in the reference: before the pooling there is no vector of the text, and after it tokens do not matter.
        tuple(head for place, head in heads if place < pooling and _changes(named, folder, head, TOKENS)),
        tuple(head for place, head in heads if place > pooling and _changes(named, folder, head, SENTENCE)),
    )


def _checked_config(named: str, folder: Path, kind: str, path: str) -> dict[str, Any]:
    """What a module's config.json says; the transformer's is checked by its family."""
    if kind not in MODULE_KEYS:
        return {}
    own = folder / path / "config.json"
    config = read_json(named, own)
    check_keys(named, own, config, MODULE_KEYS[kind])
    return config


def _gives_scores(named: str, folder: Path, kind: str, path: str) -> bool:
    """Whether a module's file says so, before the file is checked."""
    return kind == "Dense" and Head(kind, path, read_json(named, folder / path / "config.json")).gives_scores


def _head(named: str, folder: Path, kind: str, path: str, config: Mapping[str, Any]) -> Head:
    """One that says all that it must."""
    head, own = Head(kind, path, config), folder / path / "config.json"
    needed = {"Dense": ("in_features", "out_features"), "LayerNorm": ("dimension",)}.get(kind, ())
    if missing := [key for key in needed if key not in config]:
        raise StartupError(f"{named}: {own} leaves out `{missing[0]}`: fetch the model again.")
    if head.gives_scores:
        _check_scores(named, own, head)
    elif config.get("module_output_name") not in (None, head.input_name):
        raise unsupported(named, own, "module_output_name", config["module_output_name"], f'"{head.input_name}", null')
    halves = kind == "Dense" and head.activation == HALVING
    if halves and (config["out_features"] % 2 or config.get("use_residual")):
        raise StartupError(f"{named}: {own} has {HALVING}, which halves an even width and goes with no residual.")
    return head


def _check_scores(named: str, file: Path, head: Head) -> None:
    """The Dense that ends a reranker gives one number of the pooled vector."""
    if head.input_name != SENTENCE:
        raise unsupported(named, file, "module_input_name", head.input_name, f'"{SENTENCE}" where it gives scores')
    if head.width(0) != 1:
        raise unsupported(
            named, file, "out_features", head.config["out_features"], "1", "A reranker gives one number for a pair."
        )


def _changes(named: str, folder: Path, head: Head, name: str) -> bool:
    """Whether a head changes what it gets at its place, `name`; a Normalize of something else does nothing."""
    if head.input_name == name:
        return True
    if head.kind == "Normalize":
        return False
    raise unsupported(
        named, folder / head.path / "config.json", "module_input_name", head.input_name, f'"{name}" at its place'
    )


def width_after(named: str, heads: Sequence[Head], width: int) -> int:
    """The width of a vector that goes through heads.

    Args:
        named: the setting that names the model, for the error.
        width: of what the first one gets.

    Raises:
        StartupError: one of them takes another width than it is given.
    """
    for head in heads:
        if head.takes is not None and head.takes != width:
            raise StartupError(
                f"{named}: {head.path}/config.json says that its {head.kind} takes {head.takes} values, and it gets "
                f"{width}: it is not this model's."
            )
        width = head.width(width)
    return width


def static_folder(listed: Any) -> str | None:
    """The folder of the StaticEmbedding, by what modules.json holds; None where there is none. Nothing is checked."""
    first = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(first, dict) or SERVED.get(str(first.get("type"))) != STATIC:
        return None
    path = first.get("path", "")
    return path.rstrip("/") if isinstance(path, str) and path != "." and _inside(path) else ""


def trained_folders(listed: Any) -> list[str]:
    """The folders of the modules with weights of their own beside the transformer's, by what modules.json holds.

    Nothing is checked: what is wrong is said when the folder is read.
    """
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    paths = [entry.get("path") for entry in entries if SERVED.get(str(entry.get("type"))) in ("Dense", "LayerNorm")]
    return [path.rstrip("/") for path in paths if isinstance(path, str) and path and _inside(path)]


def _kind(named: str, entry: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """The class of a module; its whole path counts, since anybody's class may have the same last name."""
    full = entry.get("type")
    if not isinstance(full, str):
        raise StartupError(f"{named}: modules.json has a module without a `type`.")
    if (served := SERVED.get(full) or own.get(full)) is not None:
        return served
    last = full.rsplit(".", 1)[-1]
    if not full.startswith(PACKAGE):
        raise StartupError(
            f"{named}: modules.json has the class {full}, which is not sentence-transformers' own, and no code of a "
            f"checkpoint is run. {INSTEAD}."
        )
    what = f", {NOT_SERVED[last]}" if last in NOT_SERVED else ""
    served = ", ".join(name for name in PATHS if name != IGNORED)
    raise StartupError(f"{named}: modules.json has {full}{what}; served are {served}. {INSTEAD}.")


def _check_order(named: str, task: Task, kinds: Sequence[str], names: Sequence[Any], scoring: Sequence[bool]) -> None:
    """`scoring`: which of those that are not ignored gives scores."""
    order = tuple(kind for kind in kinds if kind != IGNORED)
    if task is Task.EMBED and ("LogitScore" in order or any(scoring)):
        raise StartupError(f"{named}: this is {KINDS[Task.RERANK]}.")
    if task is Task.RERANK and {"Pooling", STATIC} & set(order) and not any(scoring):
        raise StartupError(f"{named}: this is {KINDS[Task.EMBED]}.")
    if task is Task.EMBED and not {"Pooling", STATIC} & set(order):
        raise StartupError(f"{named}: modules.json has no Pooling, so it gives no one vector per text.")
    early = IGNORED in kinds and "Pooling" in kinds[kinds.index(IGNORED) :]
    if early or not _in_order(task, order, scoring):
        possible = ORDER if task is Task.EMBED else RERANK_ORDER
        raise StartupError(f"{named}: modules.json has {', '.join(kinds)}; supported, in this order: {possible}.")
    if len(set(map(str, names))) < len(names):  # a later module would take the place of one before it
        raise StartupError(f"{named}: two modules in modules.json have the same `name`: number them.")


def _in_order(task: Task, order: tuple[str, ...], scoring: Sequence[bool]) -> bool:
    if task is Task.RERANK and not any(scoring):
        return order in RERANK_ORDERS
    once = tuple(kind for kind in order if kind not in HEADS)
    pooled = (("Transformer", "Pooling"), (STATIC,)) if task is Task.EMBED else (("Transformer", "Pooling"),)
    last = task is Task.EMBED or (scoring[-1] and sum(scoring) == 1)
    return once in pooled and order[0] == once[0] and last


def _path(named: str, file: Path, entry: Mapping[str, Any]) -> str:
    path = entry.get("path", "")
    if not isinstance(path, str) or not _inside(path):
        raise StartupError(f"{named}: {file.name} has the path {shown(path)}, which is no folder of the model.")
    return "" if path == "." else path


def _inside(path: str) -> bool:
    """Whether a path can be that of a folder in the model's; one that is longer than a name may be raises elsewhere."""
    is_name = "\0" not in path and len(path.encode("utf-8", "surrogatepass")) <= LONGEST_NAME
    return is_name and not Path(path).is_absolute() and ".." not in Path(path).parts


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
