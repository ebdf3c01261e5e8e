"""modules.json, the modules' folders and config_sentence_transformers.json: as the reference, or refused by name."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import variants
from tests.checkpoints.variants import QUERY, TOLERANCE, Served, Variant, served
from tests.tiny_checkpoints import edit_json, tiny_bert, tiny_cross_encoder, write
from vecmill.models import modules
from vecmill.models.source import find

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLED = find("auto").folder
TEXTS = tuple(text for text in variants.TEXTS if "<pad>" not in text)
DOCUMENTS = tuple(text for text in variants.DOCUMENTS if "<pad>" not in text)

OLD = "sentence_transformers.models."
ST = "sentence_transformers."
TRANSFORMER = (f"{OLD}Transformer", "")
POOLING = (f"{OLD}Pooling", "1_Pooling")
NORMALIZE = (f"{OLD}Normalize", "2_Normalize")
DROPOUT = (f"{OLD}Dropout", "3_Dropout")

Change = Callable[[Path], Any]


def bert(folder: Path) -> None:
    tiny_bert(folder, BUNDLED)


def cross_encoder(folder: Path) -> None:
    tiny_cross_encoder(folder, kind="bert", tokenizer_from=BUNDLED)


def reranker(folder: Path) -> None:
    shutil.copytree(GOLDEN / "qwen3" / "reranker", folder, dirs_exist_ok=True)


def listed(*entries: tuple[str, str], **others: Any) -> Change:
    """modules.json with these classes and their folders."""

    def change(folder: Path) -> None:
        kept = [
            {"idx": index, "name": str(index), "path": path, "type": kind, **others}
            for index, (kind, path) in enumerate(entries)
        ]
        write(folder / "modules.json", kept)
        write(folder / "3_Dropout" / "config.json", {"dropout": 0.5})

    return change


def pooling(**keys: Any) -> Change:
    return lambda folder: write(folder / "1_Pooling" / "config.json", keys)


def library(**keys: Any) -> Change:
    return lambda folder: edit_json(folder / "config_sentence_transformers.json", **keys)


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def move_into_a_folder(folder: Path) -> None:
    """As sentence-transformers 0.x saved it."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, inner / path.name)
    listed((f"{OLD}Transformer", "0_Transformer"), POOLING)(folder)


def bare(folder: Path) -> None:
    """As transformers alone saves it."""
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()


def row(name: str, change: Change, refused: str | None = None) -> Variant:
    return Variant(name, bert, change, refused, texts=TEXTS)


WITHOUT_NORMALIZE = listed(TRANSFORMER, POOLING)
VARIANTS = [
    # Honoured.
    row("newest-names", listed(
        (f"{ST}base.modules.transformer.Transformer", ""),
        (f"{ST}sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
        (f"{ST}base.modules.normalize.Normalize", "2_Normalize"),
    )),
    row("names-of-5", listed(
        (f"{ST}sentence_transformer.modules.Transformer", ""),
        (f"{ST}sentence_transformer.modules.Pooling", "1_Pooling"),
        (f"{ST}sentence_transformer.modules.normalize.Normalize", "2_Normalize"),
    )),
    row("names-with-classes", listed((f"{OLD}Transformer.Transformer", ""), (f"{OLD}Pooling.Pooling", "1_Pooling"))),
    row("no-normalize", WITHOUT_NORMALIZE),
    row("dropout", listed(TRANSFORMER, POOLING, DROPOUT, NORMALIZE)),
    row("no-modules", bare),
    row("unnumbered", both(listed(TRANSFORMER, POOLING, NORMALIZE, idx=7))),
    row("cls", pooling(word_embedding_dimension=32, pooling_mode_cls_token=True)),
    row("last-token", pooling(embedding_dimension=32, pooling_mode="lasttoken")),
    row("a-list-of-one", pooling(embedding_dimension=32, pooling_mode=["cls"])),
    row("old-and-new", pooling(embedding_dimension=32, pooling_mode="cls", pooling_mode_mean_tokens=True)),
    row("none-named", pooling(word_embedding_dimension=32, pooling_mode_cls_token=False)),
    row("no-mode", pooling(word_embedding_dimension=32)),
    row("another-width", pooling(word_embedding_dimension=768, pooling_mode_mean_tokens=True)),
    row("normalize-in-place", lambda folder: write(
        folder / "2_Normalize" / "config.json",
        {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    )),
    row("versions", library(
        __version__={"sentence_transformers": "2.2.2", "transformers": "4.30.2", "pytorch": "2.0.1"},
        model_type="SentenceTransformer", similarity_fn_name="cosine", default_prompt_name=None,
    )),
    Variant("cross-encoder", cross_encoder, listed(TRANSFORMER), rerank=True, documents=DOCUMENTS),
    Variant(
        "cross-encoder-of-6", cross_encoder, both(
            listed((f"{ST}base.modules.transformer.Transformer", "")),
            lambda folder: write(
                folder / "config_sentence_transformers.json",
                {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity", "prompts": {}},
            ),
            lambda folder: write(folder / "sentence_bert_config.json", {
                "transformer_task": "sequence-classification",
                "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
                "module_output_name": "scores",
            }),
        ), rerank=True, documents=DOCUMENTS,
    ),
    # Refused.
    row("custom-pooling", listed(TRANSFORMER, ("my_package.Pooling", "1_Pooling")), "the class my_package.Pooling"),
    row("custom-transformer", listed(("custom_st.Transformer", ""), POOLING), "not sentence-transformers' own"),
    row("bare-name", listed(TRANSFORMER, ("Pooling", "1_Pooling")), "the class Pooling, which is not"),
    row("no-such-path", listed(TRANSFORMER, (f"{ST}extras.Pooling", "1_Pooling")), f"has {ST}extras.Pooling; served"),
    row("a-class-in-another", listed(TRANSFORMER, (f"{OLD}Transformer.Pooling", "1_Pooling")), "served are"),
    row("before-0.4", listed((f"{OLD}BERT", ""), POOLING), f"has {OLD}BERT; served are"),
    *(
        row(f"has-{kind}", listed(TRANSFORMER, POOLING, (f"{OLD}{kind}", f"2_{kind}")), f"has {OLD}{kind}, {what}")
        for kind, what in modules.NOT_SERVED.items()
    ),
    row("static-and-pooling", listed((f"{OLD}StaticEmbedding", ""), POOLING), "StaticEmbedding, Pooling; supported"),
    row("splade", listed(
        (f"{ST}sparse_encoder.models.MLMTransformer", ""), (f"{ST}sparse_encoder.models.SpladePooling", "1_Pooling")
    ), "a sparse encoder (SPLADE)"),
    row("in-a-folder", move_into_a_folder, "move the files of that folder up into"),
    row("normalize-before-transformer", listed(NORMALIZE, TRANSFORMER, POOLING), "has Normalize, Transformer, Pooling"),
    row("dropout-first", listed(TRANSFORMER, DROPOUT, POOLING), "has Transformer, Dropout, Pooling; supported"),
    row("pooling-first", listed(POOLING, TRANSFORMER), "has Pooling, Transformer; supported, in this order"),
    row("pooling-twice", listed(TRANSFORMER, POOLING, POOLING), "has Transformer, Pooling, Pooling"),
    row("two-transformers", listed(TRANSFORMER, TRANSFORMER, POOLING), "Transformer, Transformer, Pooling"),
    row("transformer-alone", listed(TRANSFORMER), "has no Pooling"),
    row("one-name", listed(TRANSFORMER, POOLING, name="0"), "the same `name`"),
    row("module-arguments", listed(TRANSFORMER, POOLING, kwargs=["task"]), '`kwargs`: ["task"]; supported: []'),
    row("module-key", listed(TRANSFORMER, POOLING, revision="main"), "the key `revision`"),
    row("outside", listed(TRANSFORMER, (f"{OLD}Pooling", "../1_Pooling")), "which is no folder of the model"),
    row("path-too-long", listed(TRANSFORMER, (f"{ST}models.Pooling", 256 * "a")), "which is no folder of the model"),
    row("path-with-a-zero", listed(TRANSFORMER, (f"{ST}models.Pooling", "a\0b")), "which is no folder of the model"),
    row("text-is-no-object", lambda folder: write(
        folder / "sentence_bert_config.json", {"modality_config": {"text": True}}
    ), "`modality_config`"),
    Variant("text-of-pairs-is-no-object", reranker, lambda folder: edit_json(
        folder / "sentence_bert_config.json", modality_config={"text": True}
    ), "`modality_config`", rerank=True),
    row("no-type", lambda folder: write(folder / "modules.json", [{"idx": 0, "path": ""}]), "without a `type`"),
    row("no-list", lambda folder: write(folder / "modules.json", {}), "is no list of modules"),
    row("empty-list", lambda folder: write(folder / "modules.json", []), "is no list of modules"),
    row("no-objects", lambda folder: write(folder / "modules.json", ["Transformer"]), "is no JSON object"),
    *(
        row(f"pools-{mode}", pooling(embedding_dimension=32, pooling_mode=mode), f"pooling {mode} is not supported")
        for mode in ("max", "mean_sqrt_len_tokens", "weightedmean", "attention")
    ),
    row("pools-two", pooling(pooling_mode_cls_token=True, pooling_mode_max_tokens=True), "pooling cls+max is not"),
    row("pools-a-list", pooling(pooling_mode=["mean", "cls"]), "pooling cls+mean is not supported"),
    row("pools-null", pooling(embedding_dimension=32, pooling_mode=None), "pooling None is not supported"),
    row("pooling-key", pooling(embedding_dimension=32, temperature=2), "the key `temperature`"),
    row("pooling-without-file", lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "has no config.json"),
    row("normalizes-another", lambda folder: write(
        folder / "2_Normalize" / "config.json", {"module_input_name": "all_layer_embeddings"}
    ), '`module_input_name`: "all_layer_embeddings"'),
    row("normalizes-into-another", lambda folder: write(
        folder / "2_Normalize" / "config.json", {"module_output_name": "token_embeddings"}
    ), '`module_output_name`: "token_embeddings"; supported: "sentence_embedding", null'),
    row("cut", library(truncate_dim=16), "`truncate_dim`: 16; supported: null. Remove it, list the size"),
    row("maxsim", library(similarity_fn_name="maxsim"), '`similarity_fn_name`: "maxsim"; supported: "cosine", "dot"'),
    row("sparse", library(model_type="SparseEncoder"), '`model_type`: "SparseEncoder"'),
    row("multi-vector", library(model_type="MultiVectorEncoder"), '`model_type`: "MultiVectorEncoder"'),
    row("of-no-type", library(model_type=None), '`model_type`: null; supported: "SentenceTransformer"'),
    row("of-a-reranker", library(model_type="CrossEncoder"), "this is a reranker; name it in RERANK_MODEL instead"),
    row("pylate", library(query_prefix="[Q] "), "the key `query_prefix`"),
    Variant("embedder", bert, refused="this is an embedding model", rerank=True),
    Variant("scores-of-another", reranker, lambda folder: edit_json(
        folder / "1_LogitScore" / "config.json", module_input_name="scores"
    ), '`module_input_name`: "scores"', rerank=True),
    Variant("score-token", reranker, lambda folder: edit_json(
        folder / "1_LogitScore" / "config.json", true_token_id="yes"
    ), '`true_token_id`: "yes"; supported: a whole number', rerank=True),
    Variant("reranker-as-embedder", reranker, refused="this is a reranker"),
]  # fmt: skip
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]
# Compared by other functions than the cosine.
SIMILARITIES = [
    *(row(f"{name}-raw", both(WITHOUT_NORMALIZE, library(similarity_fn_name=name))) for name in modules.SIMILARITIES),
    *(row(f"{name}-unit", library(similarity_fn_name=name)) for name in modules.SIMILARITIES),
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served([*VARIANTS, *SIMILARITIES], tmp_path_factory.mktemp("variants")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


async def test_without_normalize_the_vectors_keep_their_length(server: Served) -> None:
    """Unit vectors are the default, as clients of OpenAI's API expect; `normalize: false` is what `encode` gives."""
    variant = next(candidate for candidate in SERVED if candidate.name == "no-normalize")
    expected = _model(server.folders[variant.name]).encode(list(variant.texts), show_progress_bar=False)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.1
    measured = await server.vectors(variant, normalize=False, dimensions=None)
    np.testing.assert_allclose(measured, expected, atol=TOLERANCE, rtol=TOLERANCE)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(await server.vectors(variant), unit, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", SIMILARITIES, ids=str)
async def test_documents_are_ranked_by_the_models_own_similarity(server: Served, variant: Variant) -> None:
    name = variant.name.split("-")[0]
    body = {"model": variant.name, "query": QUERY, "documents": list(DOCUMENTS)}
    raw = (await server.client.post("/v1/rerank", json={**body, "raw_scores": True})).json()
    mapped = (await server.client.post("/v1/rerank", json=body)).json()
    expected = _similarities(server.folders[variant.name])
    measured = {result["index"]: result["relevance_score"] for result in raw["results"]}
    np.testing.assert_allclose([measured[index] for index in range(len(expected))], expected, rtol=1e-4, atol=1e-5)
    scores = [result["relevance_score"] for result in mapped["results"]]
    assert [result["index"] for result in mapped["results"]] == list(np.argsort(-expected, kind="stable"))
    assert all(0 < score <= 1 for score in scores)
    assert len(set(scores)) == len(scores)  # none is rounded to another
    assert raw["meta"]["method"] == mapped["meta"]["method"] == name
    models = (await server.client.get("/v1/models")).json()["data"]
    assert [model["similarity"] for model in models if model["id"] == variant.name] == [name]


def _model(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})


def _similarities(folder: Path) -> NDArray[np.float32]:
    model = _model(folder)
    query, *documents = model.encode([QUERY, *DOCUMENTS], show_progress_bar=False)
    similarities: NDArray[np.float32] = model.similarity(query[None], np.stack(documents))[0].numpy()
    return similarities


@pytest.mark.parametrize("full", sorted(modules.SERVED))
def test_the_paths_are_those_of_the_package(full: str) -> None:
    from sentence_transformers.util.misc import import_from_string  # slow to import

    module_class = import_from_string(full)
    assert module_class.__name__ == modules.SERVED[full]
    assert module_class.__module__.startswith("sentence_transformers.")


def test_every_module_that_the_package_has_is_known() -> None:
    """A release that adds one is noticed here."""
    import sentence_transformers.base.modules as base  # slow to import
    import sentence_transformers.multi_vector_encoder.modules as several
    import sentence_transformers.sentence_transformer.modules as dense
    import sentence_transformers.sparse_encoder.modules as sparse

    named = {name for package in (base, dense, sparse, several) for name in package.__all__}
    abstract = {"Module", "InputModule", "BaseTokenPooling"}
    assert named - abstract <= {*modules.PATHS, *modules.NOT_SERVED}
