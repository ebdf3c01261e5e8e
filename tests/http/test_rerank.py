"""POST /v1/rerank and /rerank: order, shapes, scores."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.oracle import st_encode

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "Berlin is known for its museums.",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "def add(a, b): return a + b",
    "Berlin is known for its museums.",
]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
async def test_the_best_document_comes_first_and_every_index_once(client: httpx.AsyncClient, path: str) -> None:
    answer = (await client.post(path, json={"model": "default", "query": QUERY, "documents": DOCUMENTS})).json()
    assert [entry["index"] for entry in answer["results"]] == [1, 0, 3, 2]  # equal documents keep their order
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert "document" not in answer["results"][0]


async def test_scores_are_the_cosine_mapped_to_0_1_or_raw(client: httpx.AsyncClient, minilm_folder: Path) -> None:
    encoded = st_encode(minilm_folder, [QUERY, *DOCUMENTS])
    cosines = encoded[1:] @ encoded[0]
    body = {"query": QUERY, "documents": DOCUMENTS}
    raw = (await client.post("/v1/rerank", json={**body, "raw_scores": True})).json()
    mapped = (await client.post("/v1/rerank", json=body)).json()
    for entry in raw["results"]:
        assert entry["relevance_score"] == pytest.approx(cosines[entry["index"]], abs=1e-5)
    for entry in mapped["results"]:
        assert entry["relevance_score"] == pytest.approx((1 + cosines[entry["index"]]) / 2, abs=1e-5)
    assert raw["meta"]["method"] == mapped["meta"]["method"] == "cosine"


async def test_usage_counts_the_tokens_of_query_and_documents(client: httpx.AsyncClient) -> None:
    body = {"query": "hello world", "documents": ["hello", "world"]}
    answer = (await client.post("/rerank", json=body)).json()
    assert answer["usage"] == {"prompt_tokens": 4 + 3 + 3, "total_tokens": 4 + 3 + 3}
    assert answer["model"] == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize(("top_n", "kept"), [(2, 2), (99, 4), (0, 4), (None, 4)])
async def test_top_n(client: httpx.AsyncClient, top_n: int | None, kept: int) -> None:
    answer = await client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, "top_n": top_n})
    assert len(answer.json()["results"]) == kept


async def test_objects_come_back_whole_and_strings_as_objects(client: httpx.AsyncClient) -> None:
    documents = [{"text": DOCUMENTS[1], "path": "a.md"}, DOCUMENTS[0]]
    body = {"query": QUERY, "documents": documents, "return_documents": "true"}
    results = (await client.post("/v1/rerank", json=body)).json()["results"]
    assert [entry["document"] for entry in results] == [documents[0], {"text": DOCUMENTS[0]}]


async def test_more_documents_than_a_forward_holds(client: httpx.AsyncClient) -> None:
    documents = [f"document {index}" for index in range(150)]
    body = {"query": "document 77", "documents": documents}
    results = (await client.post("/v1/rerank", json=body)).json()["results"]
    assert results[0]["index"] == 77
    assert sorted(entry["index"] for entry in results) == list(range(150))
    assert np.all(np.diff([entry["relevance_score"] for entry in results]) <= 0)
