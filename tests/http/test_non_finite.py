"""A text for which the model overflows is an error of its own; what shares its batch is answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from tests.conftest import serving
from tests.oracle import st_encode
from tests.tiny_checkpoints import tiny_bert, tiny_cross_encoder

OVERFLOWING = 7592  # "hello"


def overflow(folder: Path, name: str) -> None:
    """One token's embedding so large, though finite, that the layer norm after it is not a number."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name][OVERFLOWING, ::2] = 3e38
    save_file(weights, path, metadata={"format": "pt"})


async def test_the_text_is_named_and_others_in_its_batch_are_answered(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    wanted = st_encode(folder, ["fine", "good"])
    overflow(folder, "embeddings.word_embeddings.weight")
    async with serving(embed_model=str(folder)) as client:
        bad, good = await asyncio.gather(
            client.post("/v1/embeddings", json={"input": ["fine", "hello"]}),
            client.post("/v1/embeddings", json={"input": ["fine", "good"]}),
        )
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "input[1]")
    assert "not finite" in bad.json()["error"]["message"]
    vectors = [entry["embedding"] for entry in good.json()["data"]]
    np.testing.assert_allclose(np.array(vectors), wanted, atol=1e-5)


async def test_a_document_to_rerank_likewise(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_cross_encoder(tmp_path / "tiny", kind="bert", tokenizer_from=minilm_folder)
    overflow(folder, "bert.embeddings.word_embeddings.weight")
    async with serving(rerank_model=str(folder)) as client:
        bad, good = await asyncio.gather(
            client.post("/v1/rerank", json={"query": "q", "documents": ["fine", "hello"]}),
            client.post("/v1/rerank", json={"query": "q", "documents": ["fine", "good"]}),
        )
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "documents[1]")
    assert len(good.json()["results"]) == 2
