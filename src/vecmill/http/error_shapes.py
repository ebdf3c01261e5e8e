"""How each dialect writes an error, and which dialect a path speaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import TypeVar

from vecmill.core.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EmptyInput,
    InputTooLong,
    InvalidApiKey,
    InvalidInput,
    MalformedBody,
    ModelNotFound,
    NonFiniteEmbedding,
    NotServed,
    Overloaded,
    TooManyInputs,
    Unavailable,
    VecmillError,
)

T = TypeVar("T")

# Begins the tags that tell the bodies of a shared path apart.
DIALECT_TAG = "dialect:"
LONGEST_NAME = 100  # characters, of a field that the client has named
MOST_BYTES = 4096  # of an error
LENGTHS = (1000, 500, 200, 50)  # characters of its message, of which some shapes have three


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How one dialect writes an error."""

    name: str
    body: Callable[[VecmillError, int], dict[str, object]]
    status: Mapping[type[VecmillError], int] = field(default_factory=dict)
    """Where this dialect's statuses differ from the common ones."""
    busy: Callable[[Mapping[str, str]], int] = lambda headers: 429
    """The status that makes its clients try again when there is no room, by the request's headers."""


def shortened(text: object, longest: int = LONGEST_NAME) -> str:
    """The text, its middle left out where it is long: the end of a sentence has the cure."""
    whole = str(text)
    if len(whole) <= longest:
        return whole
    kept = longest // 2
    return f"{whole[:kept]} ... {whole[-kept:]}"


def bounded_body(shape: ErrorShape, error: VecmillError, status: int) -> dict[str, object]:
    """An error in a dialect's shape, of at most MOST_BYTES as JSON, whatever of the client's own it repeats."""
    told = copy(error)
    told.message = encodable(error.message)
    told.param = None if error.param is None else encodable(error.param)
    body = shape.body(told, status)
    for longest in LENGTHS:
        if len(json.dumps(body)) <= MOST_BYTES:
            break
        short = copy(told)
        short.message = shortened(told.message, longest)
        short.param = None if told.param is None else shortened(told.param)
        body = shape.body(short, status)
    return body


def encodable(text: str) -> str:
    """Lone surrogates, which JSON's escapes can bring and UTF-8 cannot hold, as escapes again."""
    return text.encode("utf-8", "backslashreplace").decode()


def nearest(table: Mapping[type[VecmillError], T], error: VecmillError) -> T:
    """What the table has for the nearest class in the error's MRO."""
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def _openai(error: VecmillError, status: int) -> dict[str, object]:
    """https://platform.openai.com/docs/guides/error-codes; all four keys are always there.

    Beside the envelope stand the keys that clients of Cohere (`message`), Jina and Voyage (`detail`) read on the paths
    that they have in common.
    """
    # LiteLLM takes every text with `invalid_request_error` for a bad request, a refused key too.
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    envelope = {"message": error.message, "type": kind, "param": error.param, "code": _openai_code(error)}
    return {"error": envelope, "message": error.message, "detail": error.message}


def _openai_code(error: VecmillError) -> str | None:
    codes: Mapping[type[VecmillError], str | None] = {
        InputTooLong: "context_length_exceeded",
        ModelNotFound: "model_not_found",
        InvalidApiKey: "invalid_api_key",
        TooManyInputs: "array_above_max_length",
        EmptyInput: "empty_array",
        Overloaded: "rate_limit_exceeded",
        DeadlineExceeded: "timeout",
        BodyTooLarge: "request_too_large",
        VecmillError: None,
    }
    return nearest(codes, error)


def _message(error: VecmillError, status: int) -> dict[str, object]:
    """https://docs.cohere.com/reference/errors"""
    return {"message": error.message}


def _tei(error: VecmillError, status: int) -> dict[str, object]:
    """https://huggingface.github.io/text-embeddings-inference/: {"error", "error_type"}."""
    kinds: Mapping[type[VecmillError], str] = {
        EmptyInput: "Empty",
        NonFiniteEmbedding: "Backend",
        NotServed: "Backend",
        InvalidInput: "Validation",
        Overloaded: "Overloaded",
        DeadlineExceeded: "Overloaded",
        Unavailable: "Unhealthy",
        VecmillError: "Validation" if status < 500 else "Backend",
    }
    return {"error": error.message, "error_type": nearest(kinds, error)}


def _ollama(error: VecmillError, status: int) -> dict[str, object]:
    """https://github.com/ollama/ollama/blob/main/docs/api.md, with the words that its clients look for."""
    words: Mapping[type[VecmillError], str] = {
        InputTooLong: "the input length exceeds the context length: ",
        ModelNotFound: "model not found: ",
        VecmillError: "",
    }
    return {"error": nearest(words, error) + error.message}


def _llama_server(error: VecmillError, status: int) -> dict[str, object]:
    """https://github.com/ggml-org/llama.cpp/tree/master/tools/server: the code is the status."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = error.message
    if isinstance(error, InputTooLong):
        kind, message = "exceed_context_size_error", f"the input exceeds the available context size: {message}"
    return {"error": {"code": status, "message": message, "type": kind}}


def _nim(error: VecmillError, status: int) -> dict[str, object]:
    """https://docs.nvidia.com/nim/nemo-retriever/text-reranking/latest/reference.html"""
    return {"object": "error", "message": error.message, "detail": error.message, "type": type(error).__name__}


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://github.com/weaviate/t2v-transformers-models"""
    return {"error": error.message}


def _detail(error: VecmillError, status: int) -> dict[str, object]:
    """FastAPI's own: what the servers before this one answered on /jobs."""
    return {"detail": error.message}


def _busy_for_openai(headers: Mapping[str, str]) -> int:
    """QMD, whose requests are those of Node itself, takes every 4xx for final, as plain HTTP clients do.

    The OpenAI SDKs try again after either. Roo Code and Kilo Code count on 429, with an SDK or, without one, with a
    header `api-key`.
    """
    return 429 if "api-key" in headers or "openai/" in headers.get("user-agent", "").lower() else 503


OPENAI = ErrorShape("openai", _openai, busy=_busy_for_openai)
COHERE = ErrorShape("cohere", _message)
TEI = ErrorShape(
    "tei",
    _tei,
    # An over-long input stays a 400: TEI's own status for it changed from 413 to 422 between versions.
    {InvalidInput: 422, EmptyInput: 400, InputTooLong: 400, MalformedBody: 400, NotServed: 424},
    busy=lambda headers: 503,
)
OLLAMA = ErrorShape("ollama", _ollama, busy=lambda headers: 503)
LLAMA_SERVER = ErrorShape("llama-server", _llama_server, busy=lambda headers: 503)
NIM = ErrorShape("nim", _nim, {InvalidInput: 422, InputTooLong: 400, MalformedBody: 400})
WEAVIATE = ErrorShape("weaviate", _error, busy=lambda headers: 503)
DETAIL = ErrorShape("detail", _detail)

# The path itself or what is below it; the longest that fits decides. Where bodies of several dialects share a path,
# the body's own decides once it is read.
SHAPES: Mapping[str, ErrorShape] = {
    **dict.fromkeys(("/v1", "/v2", "/embeddings", "/models", "/rerank", "/reranking", "/score", "/detokenize"), OPENAI),
    **dict.fromkeys(("/v1/embed", "/v2/embed"), COHERE),
    **dict.fromkeys(("/v1/ranking", "/v1/retrieval", "/v1/health", "/v1/metadata"), NIM),
    **dict.fromkeys(
        ("/embed", "/embed_all", "/embed_sparse", "/predict", "/similarity", "/tokenize", "/decode", "/info"), TEI
    ),
    "/api": OLLAMA,
    "/embedding": LLAMA_SERVER,
    **dict.fromkeys(("/vectors", "/meta", "/.well-known"), WEAVIATE),
}


def shape_for(path: str, method: str = "") -> ErrorShape:
    """The error shape of whoever calls this path; POST / is TEI's."""
    if path == "/" and method == "POST":
        return TEI
    while path:
        if path in SHAPES:
            return SHAPES[path]
        path = path.rpartition("/")[0]
    return DETAIL
