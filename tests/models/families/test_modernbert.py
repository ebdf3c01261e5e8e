"""ModernBERT equals sentence-transformers on tiny checkpoints in the hub's layouts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints.variants import Served, Variant, served
from tests.models.families import TinyModel
from tests.models.loaded import load_model, run, unit
from tests.tiny_checkpoints import VOCAB, edit_json, score_vectors, scores, tiny_modernbert
from vecmill.core.types import Row, Task
from vecmill.models.families import published_model
from vecmill.models.source import find

SLIDES, FULL = "sliding_attention", "full_attention"
BUNDLED = find("auto").folder


def embedder(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_modernbert(folder, BUNDLED, **options)


def reranker(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_modernbert(folder, BUNDLED, reranker=True, **options)


def ettin(folder: Path) -> Path:
    """An ettin-reranker: its head is sentence-transformers' modules."""
    return score_vectors(tiny_modernbert(folder, BUNDLED), scores(bias=True))


TINY = (
    TinyModel(Task.EMBED, "modernbert", embedder(), layer_kinds=3),  # the first layer has no norm
    TinyModel(Task.RERANK, "modernbert", reranker(), layer_kinds=3),
    TinyModel(Task.RERANK, "modernbert", ettin, layer_kinds=3, layout="modules"),
)


def keys(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changed)


def of_transformers_5(folder: Path) -> None:
    """config.json as today's release writes it."""
    from transformers import ModernBertConfig

    ModernBertConfig.from_pretrained(folder).save_pretrained(folder)
    assert "rope_parameters" in json.loads((folder / "config.json").read_text("utf-8"))


def of_a_masked_language_model(folder: Path) -> None:
    """The weights as ModernBERT-base has them, with its head."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

    model = ModernBertForMaskedLM(ModernBertConfig.from_pretrained(folder))
    model.model.load_state_dict(ModernBertModel.from_pretrained(folder).state_dict())
    model.save_pretrained(folder)


def row(name: str, base: Callable[[Path], Path], change: Callable[[Path], Any] | None = None, refused: str = "") -> Any:
    rerank = base is RERANKER or name.startswith("rerank")
    return Variant(name, base, change or (lambda folder: None), refused or None, rerank=rerank)


EMBEDDER, RERANKER = embedder(), reranker()
BIASES = {"norm_bias": True, "mlp_bias": True, "attention_bias": True, "hidden_activation": "silu", "norm_eps": 1e-3}
TYPES = [SLIDES, FULL, SLIDES, SLIDES, FULL]
LINEAR = {FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, SLIDES: {"rope_type": "default"}}
VARIANTS = [
    row("cls", EMBEDDER),
    row("mean", embedder(pooling="mean_tokens")),
    row("of-5", EMBEDDER, of_transformers_5),
    row("of-masked-lm", EMBEDDER, of_a_masked_language_model),
    row("biases", embedder(**BIASES)),
    row("odd-window", EMBEDDER, keys(local_attention=7)),
    row("every-second-layer", EMBEDDER, keys(global_attn_every_n_layers=2)),
    row("layers-by-type", EMBEDDER, keys(layer_types=TYPES)),
    row("bases", EMBEDDER, keys(global_rope_theta=500.0, local_rope_theta=77.0)),
    row("scaled", EMBEDDER, keys(rope_parameters=LINEAR)),
    row("no-padding", EMBEDDER, keys(pad_token_id=None)),
    row("rerank-mean", RERANKER),
    row("rerank-cls", RERANKER, keys(classifier_pooling="cls")),
    row("rerank-biases", reranker(classifier_bias=True, classifier_activation="silu", **BIASES)),
    # Refused.
    row("chunks", EMBEDDER, keys(layer_types=["chunked_attention"] * 5), "`layer_types`"),
    row("too-few-types", EMBEDDER, keys(layer_types=[SLIDES]), "`layer_types`"),
    row("longrope", EMBEDDER, keys(rope_parameters={FULL: {"rope_type": "longrope"}}), "longrope"),
    row("flat-rope", EMBEDDER, keys(rope_parameters={"rope_theta": 100.0}), "`rope_parameters.rope_theta`"),
    row("rope-scaling", EMBEDDER, keys(rope_scaling={"rope_type": "linear"}), "`rope_scaling`"),
    row("no-base", EMBEDDER, keys(local_rope_theta=None), "`local_rope_theta`: null"),
    row("causal", EMBEDDER, keys(is_causal=True), "`is_causal`: true"),
    row("remote", EMBEDDER, keys(auto_map={"AutoModel": "modeling.Own"}), "`auto_map`"),
    row("unknown", EMBEDDER, keys(attention_layer="rope"), "the key `attention_layer`"),
    row("rerank-pools-max", RERANKER, keys(classifier_pooling="max"), '`classifier_pooling`: "max"'),
    row("rerank-two-labels", RERANKER, keys(id2label={"0": "no", "1": "yes"}), "`id2label`"),
]
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("modernbert")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equals_sentence_transformers(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


def test_nomics_prompts_and_dimensions() -> None:
    base, large = (published_model(f"nomic-ai/modernbert-embed-{size}") for size in ("base", "large"))
    assert base is not None
    assert base is large
    assert base.prompts["query"] == "search_query: "
    assert base.prompts["document"] == "search_document: "
    assert base.dimensions == (256,)
    assert published_model("Alibaba-NLP/gte-modernbert-base") is None


def test_bfloat16(tmp_path: Path) -> None:
    folder = EMBEDDER(tmp_path / "model")
    random = np.random.default_rng(0)
    rows = [Row(random.integers(1000, VOCAB, length).astype(np.int32)) for length in (3, 9, 40, 100)]
    exact, rounded = (unit(run(load_model(folder, dtype=dtype)[1], rows)) for dtype in (torch.float32, torch.bfloat16))
    assert (exact * rounded).sum(axis=1).min() > 0.999


async def test_a_window_is_seen_in_long_texts_alone(server: Served) -> None:
    """So that the tests above would notice a window that is not there."""
    texts = ["one", "a longer text " * 20]
    whole = await asyncio.to_thread(_vectors, server, "cls", texts)
    other = await asyncio.to_thread(_vectors, server, "odd-window", texts)
    assert np.abs(whole[0] - other[0]).max() < 1e-5
    assert np.abs(whole[1] - other[1]).max() > 1e-3


def _vectors(server: Served, name: str, texts: list[str]) -> Any:
    from tests.oracle import st_encode

    return st_encode(server.folders[name], texts)
