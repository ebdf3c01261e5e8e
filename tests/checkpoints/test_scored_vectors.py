"""Cross-encoders of several modules: the transformer's hidden states are pooled, and dense layers score the vector, as
sentence-transformers saves ettin-reranker and Nemotron-3.5-Rerank."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import variants
from tests.checkpoints.variants import Served, Variant, refusal, served
from tests.tiny_checkpoints import (
    dense,
    edit_json,
    score_vectors,
    scores,
    tiny_bert,
    tiny_gemma3,
    tiny_modernbert,
    tiny_xlm_roberta,
    write,
)
from vecmill.models.source import find

GELU, TANH = "torch.nn.modules.activation.GELU", "torch.nn.modules.activation.Tanh"
BUNDLED = find("auto").folder
LIBRARY, MODULE = "config_sentence_transformers.json", "sentence_bert_config.json"
Write = Callable[[Path], Any]


LAYER_NORM = {"kind": "LayerNorm", "dimension": 32}
NORMALIZE = {"kind": "Normalize"}


def cross_encoder(embedder: Write, *heads: dict[str, Any], **library: Any) -> Write:
    """An embedder's folder with heads that score, and the files of a CrossEncoder."""

    def base(folder: Path) -> Path:
        embedder(folder)
        return score_vectors(folder, *(heads or (scores(),)), **library)

    return base


def bert(pooling: str = "mean_tokens") -> Write:
    return lambda folder: tiny_bert(folder, BUNDLED, pooling=pooling)


def modernbert(folder: Path) -> None:
    tiny_modernbert(folder, BUNDLED, pooling="cls_token")


ETTIN = cross_encoder(modernbert, dense(32, 32, bias=False, activation_function=GELU), LAYER_NORM, scores(bias=True))


def library(**changes: Any) -> Write:
    return lambda folder: edit_json(folder / LIBRARY, **changes)


def module(**changes: Any) -> Write:
    return lambda folder: edit_json(folder / MODULE, **changes)


def without(name: str) -> Write:
    return lambda folder: (folder / name).unlink()


def paths_of_6(folder: Path) -> None:
    """modules.json with the classes' paths as release 6 writes them."""
    entries = json.loads((folder / "modules.json").read_text("utf-8"))
    of_base = ("Transformer", "Dense")
    for entry in entries:
        kind = entry["type"].rsplit(".", 1)[-1]
        package = "base" if kind in of_base else "sentence_transformer"
        snake = {"LayerNorm": "layer_norm"}.get(kind, kind.lower())
        entry["type"] = f"sentence_transformers.{package}.modules.{snake}.{kind}"
    write(folder / "modules.json", entries)


def row(name: str, base: Write, change: Write = variants.unchanged, refused: str = "") -> Variant:
    return Variant(name, base, change, refused or None, rerank=True)


BERT = cross_encoder(bert())
VARIANTS = [
    row("ettin", ETTIN, paths_of_6),
    row("ettin-mean", cross_encoder(lambda folder: tiny_modernbert(folder, BUNDLED, pooling="mean_tokens"))),
    row("bert-types", BERT),
    row("bert-cls", cross_encoder(bert("cls_token"), NORMALIZE, dense(32, 8), scores(8))),
    row("bert-tanh", cross_encoder(bert(), scores(activation_function=TANH))),
    row("bert-prompt", cross_encoder(bert(), prompts={"query": "find: "}, default_prompt_name="query")),
    row("xlm-roberta", cross_encoder(lambda folder: tiny_xlm_roberta(folder))),
    row("gemma3", cross_encoder(lambda folder: tiny_gemma3(folder, both_ways=False))),
    row("bert-short", BERT, module(max_seq_length=20)),
    # Refused.
    row("two-labels", cross_encoder(bert(), scores(out_features=2)), refused="`out_features`: 2; supported: 1"),
    row("of-tokens", cross_encoder(bert(), scores(module_input_name="token_embeddings")), refused='where it gives sc'),
    row("not-last", cross_encoder(bert(), scores(), NORMALIZE), refused='the last of all a Dense with `module_output'),
    row("twice", cross_encoder(bert(), scores(), scores()), refused="the last of all a Dense"),
    row("embedder", bert(), refused="this is an embedding model"),
    row("no-library", BERT, without(LIBRARY), "does not say `model_type`: 'CrossEncoder'"),
    row("other-library", BERT, library(model_type="SentenceTransformer"), "this is an embedding model"),
    row("softmax", BERT, library(activation_fn="torch.nn.modules.activation.Softmax"), "names the activation"),
    row("classifier", BERT, module(transformer_task="sequence-classification"), '`transformer_task`: "sequence-cla'),
    row("no-prompt", BERT, lambda folder: edit_json(folder / "1_Pooling" / "config.json", include_prompt=False),
        "`include_prompt`: false"),
    row("max", BERT, lambda folder: write(folder / "1_Pooling" / "config.json", {"pooling_mode": "max"}),
        "pooling max"),
]  # fmt: skip
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("scored")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_scores_equal_sentence_transformers(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


async def test_relevance_is_the_sigmoid_in_every_dialect(server: Served) -> None:
    variant = SERVED[0]
    logits = await server.logits(variant)
    documents = list(variant.documents)
    body = {"model": variant.name, "query": variants.QUERY}
    for path, field, texts in (
        ("/rerank", "score", "texts"),
        ("/v1/rerank", "relevance_score", "documents"),
        ("/v2/rerank", "relevance_score", "documents"),
    ):
        answer = (await server.client.post(path, json={**body, texts: documents})).json()
        results = answer if isinstance(answer, list) else answer["results"]
        given = [result[field] for result in sorted(results, key=lambda result: int(result["index"]))]
        np.testing.assert_allclose(given, 1 / (1 + np.exp(-logits)), atol=1e-5, err_msg=path)


def test_named_as_an_embedder_it_is_refused(tmp_path: Path) -> None:
    assert "this is a reranker; name it in RERANK_MODEL" in refusal(ETTIN(tmp_path / "ettin"))
