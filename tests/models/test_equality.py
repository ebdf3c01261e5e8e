"""Vectors equal sentence-transformers' on the same files, and do not depend on what they were packed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.checkpoints import tiny_bert
from tests.conftest import serving
from tests.oracle import st_encode
from vecmill.models.bert import BertEmbedder
from vecmill.models.checkpoint import read
from vecmill.models.packing import pack
from vecmill.models.source import find

CPU = torch.device("cpu")
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "one", "naïve 你好"]


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
async def test_each_pooling_equals_sentence_transformers(tmp_path: Path, minilm_folder: Path, pooling: str) -> None:
    folder = tiny_bert(tmp_path / "tiny", minilm_folder, pooling=pooling)
    async with serving(embed_model=str(folder)) as client:
        found = (await client.post("/embed", json={"inputs": TEXTS})).json()
    np.testing.assert_allclose(np.array(found), st_encode(folder, TEXTS), atol=1e-5)


async def test_the_models_own_prompts_are_applied_by_role_and_by_name(tmp_path: Path, minilm_folder: Path) -> None:
    prompts = {"query": "search_query: ", "passage": "search_document: ", "sts": "compare: "}
    folder = tiny_bert(tmp_path / "tiny", minilm_folder, prompts=prompts)
    async with serving(embed_model=str(folder)) as client:

        async def embed(text: str, **fields: Any) -> NDArray[np.float32]:
            answer = await client.post("/embed", json={"inputs": text, **fields})
            return np.array(answer.json()[0], dtype=np.float32)

        cases: list[tuple[dict[str, Any], str]] = [
            ({"is_query": True}, "search_query: "),
            ({"is_query": False}, "search_document: "),
            ({"prompt_name": "sts", "is_query": True}, "compare: "),
            ({}, ""),
        ]
        for fields, prompt in cases:
            wanted = st_encode(folder, ["a text"], prompt=prompt)[0]
            np.testing.assert_allclose(await embed("a text", **fields), wanted, atol=1e-5)
        prefixed = await embed("search_query: a text", is_query=True)
        np.testing.assert_allclose(prefixed, await embed("a text", is_query=True), atol=1e-6)
        unknown = await client.post("/embed", json={"inputs": "x", "prompt_name": "nope"})
        assert "passage, query, sts" in unknown.json()["error"]


async def test_bfloat16_stays_within_its_tolerance(minilm_folder: Path) -> None:
    texts = [f"def function_{index}(x):\n    return x + {'x * ' * (index % 60)}{index}" for index in range(120)]
    async with serving(dtype="bfloat16") as client:
        found = np.array((await client.post("/embed", json={"inputs": texts})).json())
    assert (found * st_encode(minilm_folder, texts)).sum(axis=1).min() >= 0.9995


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> BertEmbedder:
    folder = tiny_bert(tmp_path_factory.mktemp("tiny"), minilm_folder)
    return BertEmbedder(read(find(str(folder))), torch.float32, CPU)


rows = st.lists(
    st.tuples(st.integers(1, 128), st.integers(0, 10_000)).map(
        lambda shape: np.random.default_rng(shape[1]).integers(1000, 30_000, shape[0]).astype(np.int32)
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(rows=rows)
@torch.inference_mode()
def test_a_row_packed_equals_the_row_alone(tiny: BertEmbedder, rows: list[NDArray[np.int32]]) -> None:
    packed = pack(rows, CPU)
    together = torch.nn.functional.normalize(tiny.forward(packed, use_flash_attn=False))
    for index, vector in zip(packed.order, together, strict=True):
        alone = torch.nn.functional.normalize(tiny.forward(pack([rows[index]], CPU), use_flash_attn=False))[0]
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=0)


def test_a_pack_is_the_rows_end_to_end_and_a_filler() -> None:
    packed = pack([np.array([7, 8, 9], dtype=np.int32), np.array([5], dtype=np.int32), np.array([1, 2, 3])], CPU)
    assert packed.order == (1, 0, 2)
    assert packed.input_ids.tolist() == [[5, 7, 8, 9, 1, 2, 3, *[0] * 9]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 2, *[0] * 9]]
    assert packed.cu_seqlens.tolist() == [0, 1, 4, 7, 16]
    assert [(group.start, group.rows, group.length) for group in packed.groups] == [(0, 1, 1), (1, 2, 3), (7, 1, 9)]


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_packs_have_few_shapes_and_little_filler(lengths: list[int]) -> None:
    tokens = sum(lengths)
    packed = pack([np.ones(length, dtype=np.int32) for length in lengths], CPU)
    total = packed.input_ids.shape[1]
    assert total % (16 if total <= 256 else 64) == 0
    assert 0 <= total - tokens < (16 if tokens <= 256 else 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_flash_attention_equals_sdpa_on_a_gpu(minilm_folder: Path) -> None:
    device = torch.device("cuda")
    embedder = BertEmbedder(read(find(str(minilm_folder))), torch.bfloat16, device)
    random = np.random.default_rng(0)
    packed = pack([random.integers(1000, 30_000, length).astype(np.int32) for length in (1, 3, 64, 64, 256)], device)
    flash, sdpa = (embedder.forward(packed, use_flash_attn=flash) for flash in (True, False))
    assert torch.nn.functional.cosine_similarity(flash, sdpa).min() > 0.999
