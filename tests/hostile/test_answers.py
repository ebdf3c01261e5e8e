"""What is answered can be shown and kept by anybody: no page, nothing long, nothing of the server's inside."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.conftest import serving
from tests.generation_server import GenerationServer, generation_server
from vecmill.app import create_app
from vecmill.config import load_settings

LONG = "<script>alert(1)</script>" * 200_000
MOST_BYTES = 4096
NOT_ASCII = "éÿ".encode("latin-1")
KEY = "a-key-that-is-long"


@pytest.fixture(scope="module")
def upstream() -> Iterator[GenerationServer]:
    with generation_server() as server:
        yield server


@pytest.fixture(scope="module")
async def client(upstream: GenerationServer) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(generation_url=upstream.url, cache_max_bytes=10_000_000, strict_model=True) as http_client:
        yield http_client


CALLS = [
    ("/v1/embeddings", {"input": "x", "model": LONG}),
    ("/v1/embeddings", {"input": "x", "encoding_format": LONG}),
    ("/v1/embeddings", {"input": {LONG: 1}}),
    ("/v1/embeddings", {"input": "x", "dimensions": {LONG: 1}}),
    ("/v2/embed", {"texts": ["x"], "model": LONG, "input_type": LONG}),
    ("/v1/rerank", {"query": "q", "documents": [{LONG: 1}]}),
    ("/rerank", {"query": "q", "texts": ["a"], LONG: LONG, "raw_scores": LONG}),
    ("/embed", {"inputs": ["x"], "truncation_direction": LONG, "prompt_name": LONG}),
    ("/api/embed", {"model": LONG, "input": "x"}),
    ("/api/show", {"model": LONG}),
    ("/v1/ranking", {"model": LONG, "query": {"text": "q"}, "passages": [{LONG: "x"}]}),
    ("/vectors", {"text": {LONG: 1}}),
    ("/similarity", {"inputs": {LONG: 1}}),
    ("/tokenize", {"model": LONG, "prompt": {LONG: 1}}),
    ("/jobs", {"project": LONG, "total_chunks": LONG}),
    (f"/jobs/{LONG[:20_000]}/progress", {"current": 1}),
    ("/v1/batches", {"input_file_id": LONG, "endpoint": LONG, "completion_window": "24h"}),
    (f"/v1/batches/{LONG[:20_000]}/cancel", None),
    (f"/{LONG[:20_000]}", None),
]


@pytest.mark.parametrize(("path", "body"), CALLS, ids=lambda value: str(value)[:40])
async def test_an_error_is_short_and_no_page(client: httpx.AsyncClient, path: str, body: object) -> None:
    answer = await client.post(path, json=body)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) <= MOST_BYTES
    assert answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


UNWRITABLE = [
    *[(path, body) for path, body in CALLS if body is not None and "<" not in path],
    ("/v1/batches", {"input_file_id": "f", "endpoint": "/v1/embeddings", "metadata": {LONG: "x"}}),
    ("/v2/rerank", {"query": "q", "documents": [{LONG: 1}], "rank_fields": [LONG]}),
    ("/embed", {"inputs": {LONG: LONG}}),
    ("/v1/embeddings", {"input": "x", "priority": LONG, "user": LONG}),
]


@pytest.mark.parametrize(("path", "body"), UNWRITABLE, ids=lambda value: str(value)[:40])
async def test_half_a_character_is_refused_by_name(client: httpx.AsyncClient, path: str, body: object) -> None:
    """A lone surrogate: JSON can escape it, in names and in values, and no UTF-8 holds it."""
    content = json.dumps(body).replace(json.dumps(LONG)[1:-1], "\\ud800")
    assert "\\ud800" in content
    answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()


async def test_the_end_of_a_long_error_has_its_cure(client: httpx.AsyncClient) -> None:
    message = (await client.post("/v1/embeddings", json={"input": "x", "model": LONG})).json()["error"]["message"]
    assert message.startswith("The model")
    assert len(message) < 1200


@pytest.mark.parametrize(
    "name", ["evil.html", "evil.svg", "evil.js", "input.jsonl", "ünlaut\u202e.html", "x\r\ny: z.html"]
)
async def test_a_file_is_bytes_whatever_its_name(client: httpx.AsyncClient, name: str) -> None:
    files = {"file": (name, b"<script>alert(document.domain)</script>", "text/html")}
    file = (await client.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
    answer = await client.get(f"/v1/files/{file['id']}/content")
    assert (answer.status_code, answer.content[:8]) == (200, b"<script>")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert "y" not in answer.headers


def headers(*names: str) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), NOT_ASCII) for name in names]


NAMES = (
    *("accept", "via", "x-request-id", "x-job-id", "authorization", "api-key", "x-api-key", "user-agent", "cookie"),
    *("cache-control", "x-priority", "x-request-timeout", "accept-encoding", "if-none-match", "range", "referer"),
    *("x-forwarded-for", "content-encoding", "expect", "te"),
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/embed", "/v1/embeddings", "/v1/models"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_header_that_is_not_ascii_is_no_fault(
    client: httpx.AsyncClient, upstream: GenerationServer, path: str, name: str
) -> None:
    upstream.generate = answered
    body = json.dumps({"model": "default", "inputs": "x", "input": "x", "messages": []}).encode()
    given = [*headers(name), (b"content-type", b"application/json")]
    method = "GET" if path == "/v1/models" else "POST"
    answer = await client.request(method, path, content=body if method == "POST" else None, headers=given)
    assert answer.status_code in (200, 400, 404, 415, 422), answer.text
    assert answer.headers["x-request-id"].isascii()


async def test_a_type_that_is_not_ascii_reaches_the_generation_server_as_none(
    client: httpx.AsyncClient, upstream: GenerationServer
) -> None:
    upstream.generate = answered
    sent = [(b"content-type", b"application/json; charset=" + NOT_ASCII), (b"accept", b"text/plain")]
    answer = await client.post("/v1/chat/completions", content=b"{}", headers=sent)
    assert answer.status_code == 200


async def answered(request: Request) -> Response:
    return JSONResponse({"accept": request.headers.get("accept")})


async def test_what_the_generation_server_says_is_bounded_too(
    client: httpx.AsyncClient, upstream: GenerationServer
) -> None:
    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"message": f"no: {LONG[:100_000]}"}}, 400)

    upstream.generate = refuse
    answer = await client.post("/v1/chat/completions", json={"model": "m"})
    assert (answer.status_code, len(answer.content) <= MOST_BYTES) == (400, True)
    assert "no: <script>" in answer.json()["error"]["message"]

    async def odd(request: Request) -> Response:
        response = Response(b"{}", media_type="application/json")
        response.raw_headers += [(b"cache-control", "naïve ✓".encode()), (b"retry-after", NOT_ASCII)]
        return response

    upstream.generate = odd
    answer = await client.post("/v1/chat/completions", json={"model": "m"})
    assert (answer.status_code, answer.json()) == (200, {})


async def test_health_tells_addresses_to_who_may_use_the_server(upstream: GenerationServer, tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = {"generation_url": upstream.url, "state_dir": str(state), "cache_max_bytes": 10_000_000}
    async with serving(api_key=KEY, **flags) as client:
        state.rename(tmp_path / "elsewhere")
        state.touch()  # no folder can be made there
        while (await client.get("/health")).json()["state"]["ok"]:
            await asyncio.sleep(0.05)
        outside = await client.get("/health")
        wrong = await client.get("/health", headers={"authorization": "Bearer another"})
        inside = await client.get("/health", headers={"authorization": f"Bearer {KEY}"})
        for answer in (outside, wrong):
            assert answer.status_code == 200
            assert str(tmp_path) not in answer.text
            assert upstream.url not in answer.text
            assert (answer.json()["jobs"]["ok"], answer.json()["cache"]["ok"]) == (False, False)
        assert inside.json()["generation"]["url"] == upstream.url
        assert "was removed" in inside.json()["state"]["message"]
        state.unlink()
        (tmp_path / "elsewhere").rename(state)
        while not (await client.get("/health")).json()["jobs"]["ok"]:
            await asyncio.sleep(0.05)


async def test_why_a_start_failed_is_for_who_may_use_the_server(tmp_path: Path) -> None:
    app = create_app(load_settings({"embed_model": str(tmp_path / "nowhere"), "api_key": KEY}))
    async with app.router.lifespan_context(app):
        await app.state.loading
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            outside = await client.get("/health")
            inside = await client.get("/health", headers={"api-key": KEY})
    assert (outside.status_code, outside.json()["status"], inside.status_code) == (503, "failed", 503)
    assert str(tmp_path) not in outside.text
    assert "no such folder" in inside.json()["message"]


async def test_a_store_that_fails_is_told_without_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmill.storage.sqlite_vectors.BUSY_SECONDS", 0.0)
    async with serving(state_dir=str(tmp_path), cache_max_bytes=10_000_000) as client:
        await client.get("/cache")
        holder = sqlite3.connect(tmp_path / "cache.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        answer = await client.delete("/cache")
        holder.execute("ROLLBACK")
        holder.close()
        assert answer.status_code == 503
        assert "locked" not in answer.text
        assert (await client.delete("/cache")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_no_page_may_show_ours_in_a_frame(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.headers["x-frame-options"] == "DENY"
    policy = answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.partition("script-src")[2].partition(";")[0]
