"""The text of EmbeddingGemma 2: vectors equal those of transformers' own model on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints.variants import refusal
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import bfloat16_cosines, load_model
from tests.models.test_tolerances import COSINE_IN_BFLOAT16
from tests.oracle import mean_encode
from tests.tiny_checkpoints import edit_json, tiny_embedding_gemma2
from vecmill.core.types import Task
from vecmill.models.packed_attention import attention_on
from vecmill.models.packing import Attention

TINY = (TinyModel(Task.EMBED, "embedding_gemma2", tiny_embedding_gemma2, layer_kinds=2),)
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "one", "naïve 你好"]


async def test_it_equals_transformers(tmp_path: Path) -> None:
    folder = tiny_embedding_gemma2(tmp_path / "tiny", prompts=PROMPTS)
    async with serving(embed_model=str(folder)) as client:
        [card] = (await client.get("/v1/models")).json()["data"]
        assert card["dimensions"] == 24
        for is_query, prompt in ((None, ""), (True, PROMPTS["query"]), (False, PROMPTS["document"])):
            vectors = (await client.post("/embed", json={"inputs": TEXTS, "is_query": is_query})).json()
            wanted = mean_encode(folder, [prompt + text for text in TEXTS], max_length=200)
            np.testing.assert_allclose(np.array(vectors), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_types": ["chunked_attention"] * 3}, "`layer_types`"),
        ({"per_layer_config": {"2": {"hidden_size": 3}}}, "`text_config.per_layer_config.2.hidden_size`"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "full_attention.rope_type`"),
        ({"model_type": "gemma3_text"}, "`text_config.model_type`"),
        ({"more": 1}, "`text_config.more`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_embedding_gemma2(tmp_path / "tiny")
    text = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    edit_json(folder / "config.json", text_config={**text, **changes})
    assert sentence in refusal(folder)


def test_its_large_heads_are_not_given_to_flash_attention(tmp_path: Path) -> None:
    """As those of the hub's layers with full attention, which its kernels do not have."""
    model = load_model(tiny_embedding_gemma2(tmp_path / "tiny", global_head_dim=512))[1]
    assert model.largest_head == 512
    for heads, attention in ((512, Attention.SDPA), (256, Attention.FLASH)):
        assert attention_on(torch.device("cuda"), torch.bfloat16, largest_head=heads) is attention


def test_in_bfloat16_vectors_point_the_same_way(tmp_path: Path) -> None:
    assert bfloat16_cosines(tiny_embedding_gemma2(tmp_path / "tiny")).min() >= COSINE_IN_BFLOAT16
