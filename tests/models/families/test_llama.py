"""Llama as an embedder: equal to sentence-transformers, with biases and without, one way and both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.checkpoints.variants import Served, Variant, refusal, served
from tests.models.families import TinyModel
from tests.models.families.test_mistral import LLAMA2_TOKENIZER
from tests.tiny_checkpoints import edit_json, tiny_decoder
from vecmill.core.types import Task


def tiny_llama(folder: Path, *, biases: bool = False, **options: Any) -> Path:
    """Two layers of 32 dimensions, with Llama 2's kind of tokenizer."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attention_bias=biases,
        mlp_bias=biases,
    )
    return tiny_decoder(folder, config, LLAMA2_TOKENIZER, **options)


TINY = (TinyModel(Task.EMBED, "llama", tiny_llama, prefixes=True),)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / "config.json", **changes)


VARIANTS = [
    Variant("plain", tiny_llama),
    Variant("biases", lambda folder: tiny_llama(folder, biases=True)),
    Variant("both-ways", lambda folder: tiny_llama(folder, pooling="mean_tokens"), config(is_causal=False)),
    Variant("llama3", tiny_llama, config(rope_parameters=None, rope_theta=5e5, rope_scaling=LLAMA3, pretraining_tp=2)),
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("llama")) as server:
        yield server


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_causal": None}, "`is_causal`: null"),
        ({"sliding_window": 8}, "`sliding_window`"),
        ({"auto_map": {"AutoModel": "modeling.LlamaModel"}}, "`auto_map`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder)
