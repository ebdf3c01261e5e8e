"""Each dialect says the same of the same texts, in its own words; what is of one dialect alone is here too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import serving
from tests.models.loaded import GOLDEN
from vecmill.app import create_app
from vecmill.config import load_settings

TEXTS = ["Berlin is known for its museums.", "Berlin has 3.5 million inhabitants.", "def add(a, b): return a + b"]
QUERY = "How many people live in Berlin?"

EMBED: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "OpenAI": ("/v1/embeddings", {"input": TEXTS}, lambda body: [entry["embedding"] for entry in body["data"]]),
    "Infinity": (
        "/embeddings",
        {"input": TEXTS, "model": "m", "dimensions": 0, "modality": "text"},
        lambda body: [entry["embedding"] for entry in body["data"]],
    ),
    "Jina": (
        "/v1/embeddings",
        {"input": [{"text": text} for text in TEXTS], "normalized": True, "late_chunking": False, "truncate": True},
        lambda body: [entry["embedding"] for entry in body["data"]],
    ),
    "Cohere v1": ("/v1/embed", {"texts": TEXTS}, lambda body: body["embeddings"]),
    "Cohere v2": ("/v2/embed", {"texts": TEXTS}, lambda body: body["embeddings"]["float"]),
    "Cohere v2 inputs": (
        "/v2/embed",
        {"inputs": [{"content": [{"type": "text", "text": text}]} for text in TEXTS], "truncate": "NONE"},
        lambda body: body["embeddings"]["float"],
    ),
    "TEI": ("/embed", {"inputs": TEXTS, "normalize": True, "prompt_name": None}, lambda body: body),
    "TEI, POST /": ("/", {"inputs": TEXTS}, lambda body: body),
    "Ollama": ("/api/embed", {"model": "m:latest", "input": TEXTS, "options": {}}, lambda body: body["embeddings"]),
    "llama-server": ("/embedding", {"content": TEXTS}, lambda body: [entry["embedding"][0] for entry in body]),
    "Weaviate": ("/vectors", {"texts": TEXTS}, lambda body: body["vectors"]),
}

RERANK: dict[str, tuple[str, dict[str, Any], Callable[[Any], dict[int, float]]]] = {
    "Cohere v1": ("/v1/rerank", {"query": QUERY, "documents": TEXTS}, lambda body: _by_index(body["results"])),
    "Cohere v2": ("/v2/rerank", {"query": QUERY, "documents": TEXTS}, lambda body: _by_index(body["results"])),
    "Infinity": ("/rerank", {"query": QUERY, "documents": TEXTS}, lambda body: _by_index(body["results"])),
    "llama-server": ("/reranking", {"query": QUERY, "documents": TEXTS}, lambda body: _by_index(body["results"])),
    "Voyage": (
        "/v1/rerank",
        {"query": QUERY, "documents": TEXTS, "top_k": None, "truncation": True},
        lambda body: _by_index(body["data"]),
    ),
    "TEI": ("/rerank", {"query": QUERY, "texts": TEXTS}, lambda body: _by_index(body, "score")),
    "TEI at llama-server": (
        "/v1/reranking",
        {"query": QUERY, "texts": TEXTS, "return_text": True},
        lambda body: _by_index(body, "score"),
    ),
    "Weaviate": (
        "/rerank",
        {"query": QUERY, "documents": TEXTS, "property": "text"},
        lambda body: {index: entry["score"] for index, entry in enumerate(body["scores"])},
    ),
    "vLLM score": ("/score", {"text_1": QUERY, "text_2": TEXTS}, lambda body: _by_index(body["data"], "score")),
}


def _by_index(results: list[dict[str, Any]], score: str = "relevance_score") -> dict[int, float]:
    scores = [result[score] for result in results]
    assert all(0 <= value <= 1 for value in scores)
    return {result["index"]: result[score] for result in results}


@pytest.mark.parametrize("name", EMBED)
async def test_the_same_vectors_in_every_dialect(client: httpx.AsyncClient, name: str) -> None:
    path, body, read = EMBED[name]
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    wanted = (await client.post("/v1/embeddings", json={"input": TEXTS})).json()["data"]
    np.testing.assert_allclose(read(answer.json()), [entry["embedding"] for entry in wanted], atol=1e-6)


@pytest.mark.parametrize("name", RERANK)
async def test_the_same_scores_in_every_dialect(client: httpx.AsyncClient, name: str) -> None:
    path, body, read = RERANK[name]
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    wanted = _by_index((await client.post("/v1/rerank", json={"query": QUERY, "documents": TEXTS})).json()["results"])
    assert max(wanted, key=lambda index: wanted[index]) == 1
    assert read(answer.json()) == pytest.approx(wanted, abs=1e-6)


async def test_only_weaviates_and_vllms_scores_are_in_the_clients_order(client: httpx.AsyncClient) -> None:
    for name, (path, body, _) in RERANK.items():
        answer = (await client.post(path, json=body)).json()
        results = (
            answer if isinstance(answer, list) else answer.get("results") or answer.get("data") or answer["scores"]
        )
        scores = [next(result[key] for key in ("relevance_score", "score") if key in result) for result in results]
        assert (scores == sorted(scores, reverse=True)) == (name not in ("Weaviate", "vLLM score")), name


async def test_cohere_v1_answers_by_type_only_where_types_are_asked_for(client: httpx.AsyncClient) -> None:
    plain = (await client.post("/v1/embed", json={"texts": TEXTS, "embedding_types": None})).json()
    assert (plain["response_type"], len(plain["embeddings"])) == ("embeddings_floats", 3)
    by_type = (await client.post("/v1/embed", json={"texts": TEXTS, "embedding_types": ["float"]})).json()
    assert (by_type["response_type"], list(by_type["embeddings"])) == ("embeddings_by_type", ["float"])
    for body in (plain, by_type):
        assert body["id"]
        assert body["meta"]["api_version"] == {"version": "1"}
        assert body["meta"]["billed_units"]["input_tokens"] > 0


async def test_a_document_comes_back_as_an_object_whatever_it_was(client: httpx.AsyncClient) -> None:
    documents = [TEXTS[0], {"text": TEXTS[1], "id": 7, "tags": ["a"]}]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/reranking"):
        body = {"query": QUERY, "documents": documents, "return_documents": "true"}
        results = (await client.post(path, json=body)).json()["results"]
        assert [result["document"] for result in results] == [documents[1], {"text": TEXTS[0]}]
    without = await client.post("/v1/rerank", json={"query": QUERY, "documents": documents})
    assert all("document" not in result for result in without.json()["results"])


async def test_rank_fields_are_read_in_their_order(client: httpx.AsyncClient) -> None:
    documents = [{"title": "Museums", "body": TEXTS[0]}, {"title": "People", "body": TEXTS[1], "text": "other"}]
    body = {"query": QUERY, "documents": documents, "rank_fields": ["title", "body"]}
    scores = _by_index((await client.post("/v1/rerank", json=body)).json()["results"])
    joined = [f"Museums\n{TEXTS[0]}", f"People\n{TEXTS[1]}"]
    wanted = await client.post("/v1/rerank", json={"query": QUERY, "documents": joined})
    assert scores == pytest.approx(_by_index(wanted.json()["results"]), abs=1e-6)


async def test_nims_logits_are_the_raw_scores(client: httpx.AsyncClient) -> None:
    body = {"query": {"text": QUERY}, "passages": [{"text": text} for text in TEXTS], "top_n": 2}
    for path in (
        "/v1/ranking",
        "/v1/retrieval/nvidia/reranking",
        "/v1/retrieval/nvidia/some-model/reranking",
        "/rerank",
    ):
        rankings = (await client.post(path, json=body)).json()["rankings"]
        assert [entry["index"] for entry in rankings] == [1, 0]
        raw = {"query": QUERY, "documents": TEXTS, "raw_scores": True}
        wanted = (await client.post("/v1/rerank", json=raw)).json()["results"]
        assert [entry["logit"] for entry in rankings] == pytest.approx(
            [entry["relevance_score"] for entry in wanted[:2]]
        )


async def test_nim_refuses_what_is_too_long_unless_told_otherwise(client: httpx.AsyncClient) -> None:
    body = {"query": {"text": "q"}, "passages": [{"text": "word " * 500}]}
    assert (await client.post("/v1/ranking", json=body)).status_code == 400
    assert (await client.post("/v1/ranking", json={**body, "truncate": "END"})).status_code == 200


async def test_ollamas_empty_input_loads_and_embeds_nothing(client: httpx.AsyncClient) -> None:
    nothings: list[dict[str, Any]] = [{"input": ""}, {"input": []}, {}]
    for nothing in nothings:
        answer = await client.post("/api/embed", json={"model": "m", **nothing})
        assert (answer.status_code, answer.json()["embeddings"]) == (200, [])
    assert (await client.post("/api/embeddings", json={"model": "m", "prompt": ""})).json() == {"embedding": []}
    assert len((await client.post("/api/embed", json={"model": "m", "input": ["", "a"]})).json()["embeddings"]) == 2


async def test_ollamas_older_call_does_not_normalise(client: httpx.AsyncClient) -> None:
    raw = np.array((await client.post("/api/embeddings", json={"model": "m", "prompt": TEXTS[0]})).json()["embedding"])
    unit = np.array((await client.post("/api/embed", json={"model": "m", "input": TEXTS[0]})).json()["embeddings"][0])
    assert np.linalg.norm(raw) > 1.5
    np.testing.assert_allclose(raw / np.linalg.norm(raw), unit, atol=1e-5)


async def test_llama_servers_other_norm_is_refused(client: httpx.AsyncClient) -> None:
    raw = (await client.post("/embedding", json={"content": "a", "embd_normalize": -1})).json()[0]["embedding"][0]
    assert np.linalg.norm(raw) > 1.5
    answer = await client.post("/embedding", json={"content": "a", "embd_normalize": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)


@pytest.fixture(scope="module")
async def several() -> AsyncIterator[httpx.AsyncClient]:
    folder = GOLDEN / "qwen3" / "embedding"
    assert folder.is_dir()
    async with serving(
        embed_model=f"auto,{folder}", model_aliases="small=sentence-transformers/all-MiniLM-L6-v2"
    ) as http_client:
        yield http_client


async def test_every_list_of_models_names_all(several: httpx.AsyncClient) -> None:
    ids = [model["id"] for model in (await several.get("/v1/models")).json()["data"]]
    assert len(ids) == 2
    infinity = (await several.get("/models")).json()["data"]
    assert [model["id"] for model in infinity] == ids
    assert all(model["owned_by"] == "infinity" and model["stats"].keys() >= {"queue_fraction"} for model in infinity)
    tags = (await several.get("/api/tags")).json()["models"]
    assert [model["name"] for model in tags] == [ids[0], "small", ids[1]]
    nim = (await several.get("/v1/metadata")).json()
    assert [model["shortName"] for model in nim["modelInfo"]] == ids
    assert (await several.get("/info")).json()["model_id"] == ids[0]
    assert (await several.get("/meta")).json()["dim"] == 384


async def test_ollamas_tag_is_taken_off(several: httpx.AsyncClient) -> None:
    shown = await several.post("/api/show", json={"name": "small:latest"})
    assert shown.json()["model_info"]["bert.embedding_length"] == 384
    missing = await several.post("/api/show", json={"model": "nope"})
    assert missing.status_code == 404
    assert "not found" in missing.json()["error"]
    answer = await several.post("/api/embed", json={"model": "small:latest", "input": "a"})
    assert len(answer.json()["embeddings"][0]) == 384


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a", "model": "nope"}),
        ("/v2/embed", {"texts": ["a"], "model": "nope"}),
        ("/api/embed", {"input": "a", "model": "nope"}),
        ("/embedding", {"content": "a", "model": "nope"}),
        ("/tokenize", {"inputs": "a", "model": "nope"}),
    ],
)
async def test_an_unknown_model_is_a_404(several: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await several.post(path, json=body)
    assert answer.status_code == 404
    assert "nope" in answer.text


async def test_probes_tell_when_nothing_is_served(client: httpx.AsyncClient) -> None:
    for path, status in {"/v1/health/live": 200, "/v1/health/ready": 200, "/.well-known/ready": 204}.items():
        assert (await client.get(path)).status_code == status
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(_never_loaded()), base_url="http://localhost"
    ) as waiting:
        for path, status in {
            "/v1/health/live": 200,
            "/.well-known/live": 204,
            "/v1/health/ready": 503,
            "/.well-known/ready": 503,
        }.items():
            assert (await waiting.get(path)).status_code == status
        for path in ("/info", "/meta", "/models", "/v1/models", "/api/tags", "/v1/metadata"):
            assert (await waiting.get(path)).status_code == 200
        for path, body, _ in EMBED.values():
            answer = await waiting.post(path, json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


def _never_loaded() -> Any:
    return create_app(load_settings({}))


@pytest.mark.parametrize("path", ["/embed_sparse", "/embed_all", "/predict"])
async def test_what_is_not_served_says_so(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, json={"inputs": "a"})
    assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")
    assert "not served here" in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/embed", {"images": ["data:image/png;base64,AA"], "input_type": "image"}),
        ("/v2/embed", {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("/v1/embeddings", {"input": [{"image": "https://example.org/a.png"}]}),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "x"}], "input": "x"}),
        ("/v1/rerank", {"query": "q", "documents": [{"image": "x"}]}),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a", "image": "x"}]}),
    ],
)
async def test_images_are_refused_clearly(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, json=body)
    assert 400 <= answer.status_code < 500
    assert "not served here" in answer.text
