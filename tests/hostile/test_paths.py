"""Paths as clients with a wrong base URL write them, and HEAD."""

from __future__ import annotations

from urllib.parse import urljoin

import httpx
import pytest

from tests.api_document import DOCUMENT
from tests.faults.service import Service
from tests.hostile.wire import connected, request

PATHS = DOCUMENT["paths"]
POSTS = sorted(path for path, methods in PATHS.items() if "post" in methods and "{" not in path)
GETS = sorted(path for path, methods in PATHS.items() if "get" in methods and "{" not in path)


@pytest.mark.parametrize("path", POSTS)
async def test_every_route_is_reached_by_other_ways_to_write_it(client: httpx.AsyncClient, path: str) -> None:
    """An empty object is refused, or taken, as it is without them; nothing is redirected."""
    plain = await client.post(path, json={})
    assert plain.status_code != 404 or "GENERATION_URL" in plain.text
    for other in (f"{path}/", f"/{path}", f"{path}//", path.replace("/", "//")):
        answer = await client.post(f"http://localhost{other}", json={})
        assert (answer.status_code, answer.text) == (plain.status_code, plain.text), other


@pytest.mark.parametrize("path", ["/", "/docs", *(path for path in GETS if not path.endswith("/events"))])
async def test_every_page_and_reading_is_reached_by_other_ways_to_write_it(
    client: httpx.AsyncClient, path: str
) -> None:
    plain = await client.get(path)
    assert plain.status_code != 404
    for other in (f"{path}/", f"/{path}", f"{path}//"):
        answer = await client.get(f"http://localhost{other}")
        kinds = (answer.headers.get("content-type"), plain.headers.get("content-type"))
        assert (answer.status_code, kinds[0]) == (plain.status_code, kinds[1]), other


@pytest.mark.parametrize("below", ["", "/embed", "/a/b"])
@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/"])
async def test_the_dashboard_is_found_by_its_name(client: httpx.AsyncClient, path: str, below: str) -> None:
    """`below`: where a proxy serves the server's `/`."""
    for answer in (await client.get(f"http://localhost{path}"), await client.head(f"http://localhost{path}")):
        assert answer.status_code == 307
        assert urljoin(f"http://proxy{below}{path}", answer.headers["location"]) == f"http://proxy{below}/"
    assert (await client.get(f"http://localhost{path}", follow_redirects=True)).text.startswith("<!doctype html>")
    assert (await client.post(f"http://localhost{path}", json={})).status_code == 405


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/v1/embeddings", {"input": "x"}),
        ("//v1/v1/embeddings/", {"input": "x"}),
        ("/v2/v2/embed", {"texts": ["x"], "input_type": "search_query", "model": "m"}),
        ("/api/api/embed", {"input": "x", "model": "m"}),
    ],
)
async def test_a_base_address_that_ends_with_the_first_part_of_the_path(
    client: httpx.AsyncClient, path: str, body: object
) -> None:
    assert (await client.post(f"http://localhost{path}", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v2/embed", "/v2/embed"),
        ("/v1/api/embed", "/api/embed"),
        ("/api/v1/embeddings", "/v1/embeddings"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("/v1/embed_all/embed", "/embed"),
    ],
)
async def test_a_part_too_many_is_named(client: httpx.AsyncClient, path: str, meant: str) -> None:
    answer = await client.post(path, json={})
    assert answer.status_code == 404
    assert f"{meant} is served" in answer.text
    assert "base URL" in answer.text


async def test_what_is_nowhere_stays_nowhere(client: httpx.AsyncClient) -> None:
    for path in ("/nowhere", "/v1/nowhere", "/v1/v1/nowhere", "/v1/v1", "/" + "a/" * 2000, "/%00", "/v1/%2e%2e"):
        answer = await client.get(path)
        assert answer.status_code == 404
        assert "is served" not in answer.text


async def test_a_percent_encoded_path_is_that_path(client: httpx.AsyncClient) -> None:
    assert (await client.post("http://localhost/v1/%65mbeddings", json={"input": "x"})).status_code == 200


@pytest.mark.parametrize("path", [path for path in GETS if not path.endswith("/events")])
async def test_head_wherever_get_is(client: httpx.AsyncClient, path: str) -> None:
    got, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.get("content-type") == got.headers.get("content-type")


def test_the_head_of_a_stream_has_an_end(wired: Service) -> None:
    with connected(wired.url) as wire:
        for path in ("/jobs/events", "/", "/nowhere", "/static/dashboard.js", "/health"):
            wire.send(request(path, method="HEAD"))
            answer = wire.answer(head_only=True)
            assert answer.status == (404 if path == "/nowhere" else 200)
        wire.send(request("/ready", method="GET"))
        assert wire.answer().json()


async def test_what_is_possible_is_told_with_head(client: httpx.AsyncClient) -> None:
    answer = await client.put("/jobs", json={})
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD, POST"
