"""Huge numbers of mistakes or entries, in every list and mapping of every route: the first one is reported, fast."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx
import orjson
import pytest
from fastapi.routing import APIRoute

from tests.api_document import DOCUMENT
from tests.conftest import serving
from tests.hostile.stalls import memory_taken
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.http.route import InferenceRoute, JsonRoute

MANY = 3000  # more than MAX_CLIENT_BATCH_SIZE
MOST_MISTAKES = 8
MOST_ERROR_BYTES = 4096
# Of the processor, not of the clock: other programs do not count. Parsing takes a tenth.
MOST_SECONDS = 1.0

APP = create_app(load_settings())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]

SHAPES: dict[str, object] = {
    "objects": [{}] * MANY,
    "texts": ["a"] * MANY,
    "lists": [[]] * MANY,
    "booleans": [True] * MANY,
    "keys": {f"key {number}": number for number in range(MANY)},
    "a text before objects": ["a", *[{}] * MANY],
}


def open_fields(schema: Mapping[str, Any], depth: int = 2) -> Iterator[tuple[str, ...]]:
    """The paths of the properties that may hold lists or mappings, or anything."""
    for name, field in schema.get("properties", {}).items():
        for kind in kinds(field):
            if "$ref" in kind and depth:
                inner = SCHEMAS[kind["$ref"].rpartition("/")[2]]
                yield from ((name, *path) for path in open_fields(inner, depth - 1))
            if kind.get("type", "array") in ("array", "object"):
                yield (name,)


def kinds(field: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that a value may have."""
    return [inner for part in field["anyOf"] for inner in kinds(part)] if "anyOf" in field else [field]


FIELDS = sorted(
    {
        (path, example_name, field)
        for path, methods in DOCUMENT["paths"].items()
        if "post" in methods and "{" not in path
        for content in methods["post"].get("requestBody", {}).get("content", {}).values()
        for example_name in content.get("examples", {})
        for field in open_fields(SCHEMAS[example_name])
    }
)


def body_with(path: str, example_name: str, field: tuple[str, ...], value: object) -> dict[str, Any]:
    """The example of the document, with one value of another kind."""
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    body: dict[str, Any] = orjson.loads(orjson.dumps(content["examples"][example_name]["value"]))
    inner = body
    for name in field[:-1]:
        inner = inner.setdefault(name, {})
    inner[field[-1]] = value
    return body


ROUTES = [
    route
    for part in APP.routes
    for route in getattr(part, "original_router", APP).routes
    if isinstance(route, APIRoute) and route.body_field is not None
]
BODIES = {route.path: route.body_field for route in ROUTES if route.body_field is not None}


def test_every_body_of_the_document_is_looked_at() -> None:
    assert {path for path, _, _ in FIELDS} <= BODIES.keys()
    assert len(BODIES) > 20


def test_the_lists_of_every_dialect_are_among_the_fields() -> None:
    listed = {(path, ".".join(field)) for path, _, field in FIELDS}
    assert {
        ("/rerank", "texts"),
        ("/v1/rerank", "documents"),
        ("/v1/rerank", "rank_fields"),
        ("/v1/score", "text_2"),
        ("/v1/ranking", "passages"),
        ("/v2/embed", "texts"),
        ("/v2/embed", "inputs"),
        ("/v2/embed", "embedding_types"),
        ("/similarity", "inputs.sentences"),
        ("/v1/batches", "metadata"),
        ("/api/embed", "input"),
        ("/vectors", "texts"),
    } <= listed


def test_every_route_with_a_body_bounds_it() -> None:
    assert [route.path for route in ROUTES if not isinstance(route, JsonRoute | InferenceRoute)] == []


@pytest.mark.parametrize("path", sorted({path for path, _, _ in FIELDS}))
def test_entries_without_number_are_refused_at_the_first(path: str) -> None:
    """Without a server: the cost of mistakes is how many of them are noted."""
    for example_name, field in ((name, field) for where, name, field in FIELDS if where == path):
        for shape, value in SHAPES.items():
            body = body_with(path, example_name, field, value)
            _, errors = BODIES[path].validate(body, {}, loc=("body",))
            assert len(errors or ()) < MOST_MISTAKES, (example_name, field, shape)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": "q", "texts": [{}] * 120_000}),
        ("/v1/score", {"text_1": "q", "text_2": [{}] * 120_000}),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [1] * 1_000_000}),
        ("/v2/embed", {"texts": [1] * 1_000_000}),
        ("/similarity", {"inputs": {"source_sentence": "q", "sentences": [1] * 1_000_000}}),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "rank_fields": [1] * 1_000_000}),
        ("/v1/embeddings", {"input": [[1]] * 120_000}),
        ("/v2/rerank", {"query": "q", "documents": ["a"] * 1_000_000}),
        ("/api/embed", {"input": ["a"] * 1_000_000}),
        ("/v1/batches", {"metadata": {f"key {number}": number for number in range(120_000)}}),
    ],
)
async def test_a_million_entries_cost_as_much_as_their_parsing(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    content = orjson.dumps(body)
    with memory_taken() as memory:
        began = time.process_time()
        answer = await client.post(path, content=content, headers={"content-type": "application/json"})
        taken = time.process_time() - began
    assert answer.status_code in (400, 422)
    assert len(answer.content) <= MOST_ERROR_BYTES
    assert taken < MOST_SECONDS
    assert memory.highest < 8 * len(content) + 100_000_000  # 50 MB in a process that has nothing else to do


TOO_MANY: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"input": ["a"] * 5}, "input"),
    ("/v1/embeddings", {"input": [[7]] * 5}, "input"),
    ("/embed", {"inputs": [{"text": "a"}] * 5}, "inputs"),
    ("/v2/embed", {"texts": ["a"] * 5}, "texts"),
    ("/v2/embed", {"inputs": [{"content": "a"}] * 5}, "inputs"),
    ("/api/embed", {"input": ["a"] * 5}, "input"),
    ("/embedding", {"content": ["a"] * 5}, "content"),
    ("/vectors", {"texts": ["a"] * 5}, "texts"),
    ("/v1/rerank", {"query": "q", "documents": ["a"] * 5}, "documents"),
    ("/rerank", {"query": "q", "texts": ["a"] * 5}, "texts"),
    ("/rerank", {"query": "q", "documents": ["a"] * 5, "property": "p"}, "documents"),
    ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}] * 5}, "passages"),
    ("/score", {"text_1": "q", "text_2": ["a"] * 5}, "text_2"),
    ("/score", {"text_1": ["q"] * 5, "text_2": ["a"] * 5}, "text_1"),
    ("/similarity", {"inputs": {"source_sentence": "q", "sentences": ["a"] * 5}}, "inputs.sentences"),
    ("/tokenize", {"inputs": ["a"] * 5}, "inputs"),
    ("/decode", {"ids": [[7]] * 5}, "ids"),
]


@pytest.fixture(scope="module")
async def small() -> AsyncIterator[httpx.AsyncClient]:
    """A server that takes four inputs in a request."""
    async with serving(max_client_batch_size=4) as client:
        yield client


@pytest.mark.parametrize(("path", "body", "field"), TOO_MANY)
async def test_inputs_are_counted_by_the_servers_own_setting(
    small: httpx.AsyncClient, path: str, body: dict[str, Any], field: str
) -> None:
    answer = await small.post(path, json=body)
    assert answer.status_code in (400, 422)
    assert f"`{field}` has 5 entries, 4 are possible (MAX_CLIENT_BATCH_SIZE); split the request." in answer.text


async def test_token_ids_of_one_text_are_one_input(small: httpx.AsyncClient) -> None:
    assert (await small.post("/embed", json={"inputs": [2088] * 5})).status_code == 200


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/rerank", {"query": "q", "texts": ["a", {}]}, "texts[1]"),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}, {"text": 1}]}, "passages[1].text"),
        ("/v1/embeddings", {"input": [1] * 3000 + ["a"]}, "entry 3000"),
        ("/v1/embeddings", {"input": [1, 2**40]}, "entry 1"),
        ("/v1/embeddings", {"input": "x", "task": LONG}, "task"),
        ("/v1/embeddings", {"input": "x", "input_type": LONG}, "input_type"),
        ("/v1/embeddings", {"input": "x", "priority": LONG}, "priority"),
        ("/v1/embeddings", {"input": "x", "truncate": LONG}, "truncate"),
        ("/v1/embeddings", {"input": "x", "truncation_side": LONG}, "truncation_side"),
        ("/v1/embeddings", {"input": "x", "dimensions": LONG}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "prompt_name": LONG}, "prompt_name"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "rank_fields": ["a"] * 129}, "rank_fields"),
        ("/v1/rerank", {"query": "q", "documents": [{}], "rank_fields": [LONG]}, "rank_fields"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["float"] * 17}, "embedding_types"),
        (
            "/v1/batches",
            {
                "input_file_id": "f",
                "endpoint": "/v1/embeddings",
                "completion_window": "24h",
                "metadata": {LONG: "a"},
            },
            "metadata",
        ),
    ],
)
async def test_a_mistake_names_its_field_and_repeats_little(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], named: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code in (400, 422)
    assert named in answer.text
    assert "sys." not in answer.text
    assert len(answer.content) <= MOST_ERROR_BYTES


async def test_a_document_nested_too_deep_to_come_back_is_refused(client: httpx.AsyncClient) -> None:
    nested: Any = "a"
    for _ in range(300):
        nested = [nested]
    for flags in ({"return_documents": True}, {"rank_fields": ["deep"]}):
        body = {"query": "q", "documents": [{"text": "a", "deep": nested}], **flags}
        answer = await client.post("/v1/rerank", json=body)
        assert answer.status_code == 400
        assert "`documents`: entry 0 is nested more than 64 levels deep" in answer.text


async def test_a_field_named_again_and_again_is_read_once(client: httpx.AsyncClient) -> None:
    documents = [{"title": "copy a tree"}, {"title": "parse a date"}]
    once, often = [
        (await client.post("/v1/rerank", json={"query": "q", "documents": documents, "rank_fields": fields})).json()
        for fields in (["title"], ["title"] * 100)
    ]
    assert once["results"] == often["results"]
    assert once["usage"] == often["usage"]
