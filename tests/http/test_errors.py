"""Every error has a status, a body and headers in every dialect, and the words that the dialect's clients look for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest
from fastapi.routing import APIRoute

from tests.conftest import serving
from vecmill.core.errors import (
    DeadlineExceeded,
    EmptyInput,
    InputTooLong,
    InvalidApiKey,
    InvalidInput,
    ModelNotFound,
    NotServed,
    Overloaded,
    StartupError,
    StartupObstacle,
    Unavailable,
    VecmillError,
)
from vecmill.http.dialects.bodies import Dialect
from vecmill.http.dialects.registry import DIALECTS, shape_for
from vecmill.http.errors import DETAIL, STATUS, ErrorShape, error_response


def every_error(base: type[VecmillError] = VecmillError) -> Iterator[type[VecmillError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from every_error(kind)


# These end the process before there is anybody to answer.
SERVED = [kind for kind in every_error() if not issubclass(kind, StartupError | StartupObstacle)]
SHAPES = {shape.name: shape for shape in (DETAIL, *(dialect.errors for dialect in DIALECTS))}

# Where each dialect's client finds the text.
TEXT: dict[str, Callable[[Any], object]] = {
    "openai": lambda body: body["error"]["message"],
    "cohere": lambda body: body["message"],
    "tei": lambda body: body["error"],
    "ollama": lambda body: body["error"],
    "llama-server": lambda body: body["error"]["message"],
    "nim": lambda body: body["detail"],
    "weaviate": lambda body: body["error"],
    "detail": lambda body: body["detail"],
}


def answer(shape: ErrorShape, error: VecmillError) -> tuple[int, Any, httpx.Headers]:
    response = error_response(shape, error)
    return response.status_code, orjson.loads(bytes(response.body)), httpx.Headers(dict(response.headers))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", SERVED)
def test_every_error_is_answered_in_every_dialect(kind: type[VecmillError], name: str) -> None:
    error = kind("What is wrong, and the cure.", param="input[3]")
    status, body, headers = answer(SHAPES[name], error)
    assert 400 <= status < 600
    assert status != 500
    assert str(TEXT[name](body)).endswith("What is wrong, and the cure.")
    common = next(STATUS[base] for base in kind.__mro__ if base in STATUS)
    assert status == common or (name in ("tei", "nim") and 400 <= status < 500)
    if issubclass(kind, Overloaded | Unavailable):
        seconds = int(headers["retry-after"])
        assert 1 <= seconds <= 120  # the OpenAI SDKs do not wait longer
        assert headers["retry-after-ms"] == f"{seconds}000"
        assert headers["x-should-retry"] == "true"
    elif issubclass(kind, DeadlineExceeded):
        assert headers["x-should-retry"] == "false"
    else:
        assert "retry-after" not in headers
    assert ("www-authenticate" in headers) == issubclass(kind, InvalidApiKey)


@pytest.mark.parametrize("kind", SERVED)
def test_openais_error_has_its_four_keys(kind: type[VecmillError]) -> None:
    status, body, _ = answer(SHAPES["openai"], kind(param="input"))
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == "input"
    assert isinstance(body["error"]["code"], str | None)
    assert body["error"]["type"] in (
        "authentication_error",
        "invalid_request_error",
        "rate_limit_error",
        "server_error",
    )
    assert (body["error"]["type"] == "server_error") == (status >= 500)
    # Cohere's, Jina's and Voyage's clients call the same paths.
    assert body["message"] == body["detail"] == body["error"]["message"]


@pytest.mark.parametrize("kind", SERVED)
def test_teis_error_types_are_its_own(kind: type[VecmillError]) -> None:
    _, body, _ = answer(SHAPES["tei"], kind())
    assert body["error_type"] in ("Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty")


@pytest.mark.parametrize(
    ("name", "error", "status", "words"),
    [
        ("openai", InputTooLong(), 400, '"code":"context_length_exceeded"'),
        ("openai", InputTooLong(), 400, "maximum context length"),
        ("openai", ModelNotFound(), 404, '"code":"model_not_found"'),
        ("openai", InvalidApiKey(), 401, '"code":"invalid_api_key"'),
        ("openai", Overloaded(), 429, '"code":"rate_limit_exceeded"'),
        ("tei", Overloaded(), 429, '"error_type":"Overloaded"'),
        ("tei", EmptyInput(), 400, '"error_type":"Empty"'),
        ("tei", InvalidInput(), 422, '"error_type":"Validation"'),
        ("tei", NotServed(), 424, "not served here"),
        ("ollama", InputTooLong(), 400, "the input length exceeds the context length"),
        ("ollama", ModelNotFound(), 404, "not found"),
        ("llama-server", InputTooLong(), 400, "exceed_context_size_error"),
        ("llama-server", InputTooLong(), 400, "exceeds the available context size"),
        ("nim", InvalidInput(), 422, '"detail"'),
        ("cohere", InvalidApiKey(), 401, '"message"'),
    ],
)
def test_the_words_that_clients_look_for(name: str, error: VecmillError, status: int, words: str) -> None:
    found, body, _ = answer(SHAPES[name], error)
    assert found == status
    assert words in orjson.dumps(body).decode()


def test_the_messages_are_sentences() -> None:
    assert all(len(kind().message) > 15 for kind in SERVED)


def test_codecartographer_tries_again_where_the_text_says_that_it_may() -> None:
    for kind in SERVED:
        if issubclass(kind, Overloaded | Unavailable):
            assert any(word in kind().message for word in ("temporarily", "503", "502", "failed"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/embeddings", "openai"),
        ("/v1/embed", "cohere"),
        ("/v2/embed", "cohere"),
        ("/v2/rerank", "openai"),
        ("/v1/rerank", "openai"),
        ("/v1/nothing", "openai"),
        ("/embed", "tei"),
        ("/embed_sparse", "tei"),
        ("/embedding", "llama-server"),
        ("/embeddings", "openai"),
        ("/api/embed", "ollama"),
        ("/v1/ranking", "nim"),
        ("/v1/retrieval/nvidia/some/reranking", "nim"),
        ("/vectors", "weaviate"),
        ("/jobs/x", "detail"),
    ],
)
def test_a_path_speaks_one_dialect(path: str, name: str) -> None:
    assert shape_for(path).name == name


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.errors.name)
def test_errors_on_a_dialects_own_routes_have_its_shape(dialect: Dialect) -> None:
    for route in dialect.router.routes:
        assert isinstance(route, APIRoute)
        for method in route.methods or ():
            assert shape_for(route.path, method) is dialect.errors, route.path


def test_a_path_is_declared_by_one_dialect() -> None:
    declared = [path for dialect in DIALECTS for path in dialect.paths]
    assert len(declared) == len(set(declared))


# One way to be refused by the table itself, for each body of a shared path.
SHARED = [
    ("/rerank", {"query": "q", "texts": []}, "tei", 400),
    ("/rerank", {"query": "q", "texts": [1]}, "tei", 422),
    ("/rerank", {"query": {"text": "q"}, "passages": []}, "nim", 422),
    ("/rerank", {"query": "q", "documents": [], "property": ""}, "weaviate", 400),
    ("/rerank", {"query": "q", "documents": []}, "openai", 400),
    ("/v1/rerank", {"query": "q", "documents": [], "top_k": 1}, "openai", 400),
    ("/v1/rerank", {"query": "q"}, "openai", 400),
    ("/tokenize", {"prompt": 1}, "openai", 400),
    ("/tokenize", {"inputs": 1}, "tei", 422),
    ("/", {"inputs": {"sentences": []}}, "tei", 422),
    ("/", {"inputs": []}, "tei", 400),
]


@pytest.mark.parametrize(("path", "body", "name", "status"), SHARED)
async def test_on_a_shared_path_the_body_decides(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], name: str, status: int
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status
    assert isinstance(TEXT[name](response.json()), str)
    assert "dialect:" not in response.text


async def test_the_context_length_in_every_dialects_words() -> None:
    long = "word " * 400
    async with serving(auto_truncate=False) as client:
        refused = {
            "/v1/embeddings": ({"input": long}, "maximum context length"),
            "/embed": ({"inputs": long}, "maximum context length"),
            "/v2/embed": ({"texts": [long], "truncate": "NONE"}, "maximum context length"),
            "/api/embed": ({"model": "m", "input": long, "truncate": False}, "exceeds the context length"),
            "/embedding": ({"content": long}, "exceeds the available context size"),
            "/v1/rerank": ({"query": "q", "documents": [long]}, "maximum context length"),
            "/v1/ranking": ({"query": {"text": "q"}, "passages": [{"text": long}]}, "maximum context length"),
            "/score": ({"text_1": "a", "text_2": [long]}, "maximum context length"),
        }
        for path, (body, words) in refused.items():
            response = await client.post(path, json=body)
            assert response.status_code == 400, path
            assert words in response.text, path
