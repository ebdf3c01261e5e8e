"""A device that runs out of memory makes an answer slower, not an error; only a text too long for it is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.conftest import serving
from tests.tiny_checkpoints import tiny_bert
from vecmill.http import encoding, middleware, route
from vecmill.inference import models
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.networks import EmbeddingModel
from vecmill.models.packing import PackedBatch

TEXTS = ["word " * (number % 50) for number in range(100)]
FITS = 96  # tokens a forward, on the device that these tests make


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on the device has room for so many tokens a forward."""
    forward = EmbeddingModel.forward

    def limited(self: EmbeddingModel, packed: PackedBatch) -> torch.Tensor:
        if packed.input_ids.shape[1] > FITS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, packed)

    return lambda: monkeypatch.setattr(EmbeddingModel, "forward", limited)


async def vectors(client: httpx.AsyncClient) -> np.typing.NDArray[np.float32]:
    answered = await client.post("/embed", json={"inputs": TEXTS})
    assert answered.status_code == 200, answered.text
    return np.array(answered.json(), dtype=np.float32)


async def test_batches_are_halved_the_budget_lowered_and_all_of_it_told(
    tmp_path: Path, minilm_folder: Path, cramped: Any
) -> None:
    async with serving(embed_model=str(tiny_bert(tmp_path / "tiny", minilm_folder))) as client:
        wanted = await vectors(client)
        before = (await client.get("/capabilities")).json()["max_batch_tokens"]
        cramped()
        np.testing.assert_allclose(await vectors(client), wanted, atol=1e-5)
        assert (await client.get("/capabilities")).json()["max_batch_tokens"] <= FITS < before
        splits = (await client.get("/stats")).json()["out_of_memory_splits"]
        assert splits > 0
        np.testing.assert_allclose(await vectors(client), wanted, atol=1e-5)
        assert (await client.get("/stats")).json()["out_of_memory_splits"] <= splits + 2  # the budget has been learnt
        assert "vecmill_out_of_memory_splits_total" in (await client.get("/metrics")).text


async def test_a_text_that_does_not_fit_alone_is_a_400_with_its_length(
    tmp_path: Path, minilm_folder: Path, cramped: Any
) -> None:
    folder = tiny_bert(tmp_path / "tiny", minilm_folder, max_seq_length=128)
    async with serving(embed_model=str(folder)) as client:
        cramped()
        refused = await client.post("/v1/embeddings", json={"input": ["short", "word " * 200]})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "input[1]"
        assert "128 tokens" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert (await client.post("/v1/embeddings", json={"input": "short"})).status_code == 200


ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
PLACES = {
    "reading the body": (route, "parse", MemoryError()),
    "before the route": (middleware.RequestLine, "__call__", MemoryError()),
    "a tokenizer's thread": (TokenizerPool, "encode_part", MemoryError()),
    "a thread's stack": (TokenizerPool, "encode_part", RuntimeError("can't start new thread")),
    "the forward pass": (EmbeddingModel, "forward", ALLOCATOR),
    "a group of tasks": (EmbeddingModel, "forward", ExceptionGroup("tasks", [ALLOCATOR])),
    "finishing vectors": (models, "finish_vectors", MemoryError()),
    "writing the answer": (encoding, "whole_body", OSError(errno.ENOMEM, "Cannot allocate memory")),
}
BODIES: dict[str, Any] = {
    "/v1/embeddings": {"model": "m", "input": ["a text"]},
    "/embed": {"inputs": ["a text"]},
    "/v2/embed": {"texts": ["a text"]},
    "/api/embed": {"model": "m", "input": ["a text"]},
    "/v2/rerank": {"query": "a query", "documents": ["a text"]},
}


def raising(error: Exception) -> Any:
    def end(*_: object, **__: object) -> None:
        raise error

    return end


@pytest.mark.parametrize(("owner", "name", "error"), PLACES.values(), ids=PLACES)
async def test_memory_that_ends_anywhere_is_a_503_in_every_shape_and_passes(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(error))
        for path, body in BODIES.items():
            if path == "/v2/rerank" and owner in (models, encoding):
                continue  # it has no vectors to finish or to write
            refused = await client.post(path, json=body, headers={"cache-control": "no-store"})
            assert (refused.status_code, path) == (503, path), refused.text
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["x-request-id"]
            told = refused.json()
            detail = told.get("message") or told["error"]
            assert "out of memory" in (detail["message"] if isinstance(detail, dict) else detail)
    for path, body in BODIES.items():
        assert (await client.post(path, json=body)).status_code == 200


async def test_a_fault_that_is_no_lack_of_memory_stays_one(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "finish_vectors", raising(RuntimeError("a title that says nothing of room")))
    assert (await client.post("/v1/embeddings", json=BODIES["/v1/embeddings"])).status_code == 500
