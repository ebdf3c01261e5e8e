"""The server that is measured: its address, how its dialect is spoken, and what is read of its answers."""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

from vecmill.refusals import start_of
from vecmill.tools.console import CommandError
from vecmill.tools.http_client import base_url, request_headers

# `usage` stands before or behind the list, so looking at both ends saves parsing megabytes of numbers.
ENDS_BYTES = 1024
TOKENS = re.compile(rb'"(?:prompt_tokens|total_tokens|prompt_eval_count)"\s*:\s*([0-9]{1,18})(?![0-9])')
CACHED = re.compile(rb'"cached_tokens"\s*:\s*([0-9]{1,18})(?![0-9])')
# tei has no place for them in the body.
TOKENS_HEADER, CACHED_HEADER = "x-compute-tokens", "x-cached-tokens"
COUNT = re.compile("[0-9]{1,18}")
FLOAT_BYTES = 4


class BenchError(CommandError):
    """Nothing can be measured."""

    exit_code = 2


class BadAnswer(BenchError):
    """The server is there, and its first answer is an error or not what the dialect asks for."""

    exit_code = 1


class TargetApi(StrEnum):
    """The API that requests are written in."""

    OPENAI = "openai"
    INFINITY = "infinity"
    TEI = "tei"
    OLLAMA = "ollama"
    RERANK = "rerank"


class Encoding(StrEnum):
    """How vectors are to come back, where the dialect lets the client choose (openai, infinity)."""

    BASE64 = "base64"
    FLOAT = "float"


PATHS = {
    TargetApi.OPENAI: "/v1/embeddings",
    TargetApi.INFINITY: "/embeddings",
    TargetApi.TEI: "/embed",
    TargetApi.OLLAMA: "/api/embed",
    TargetApi.RERANK: "/v1/rerank",
}


@dataclass(frozen=True, slots=True)
class Payload:
    """A request, ready to be sent."""

    body: bytes
    texts: int
    text_bytes: int
    """Of the texts in UTF-8, without what JSON adds."""


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A server's address, its dialect, and what goes into every request."""

    url: str
    """With or without `http://`, and for openai and rerank with or without `/v1`."""
    dialect: TargetApi = TargetApi.OPENAI
    model: str | None = None
    """Left out of the requests where None: the server's default."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    encoding: Encoding = Encoding.BASE64
    cached: bool = False
    """Whether the server may answer from a cache."""

    @property
    def endpoint(self) -> str:
        """The address that requests go to.

        Raises:
            UsageError: `url` is not an address.
        """
        base, path = base_url(self.url), PATHS[self.dialect]
        if path.startswith("/v1/"):
            base = base.removesuffix("/v1")
        return base + path

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        fresh = {} if self.cached else {"Cache-Control": "no-store"}
        return {"Content-Type": "application/json", **fresh, **request_headers(self.api_key)}

    def body(self, texts: Sequence[str], query: str) -> bytes:
        """A request for the texts' vectors, or with `rerank` for the texts' scores against the query."""
        fields: dict[str, object]
        match self.dialect:
            case TargetApi.OPENAI | TargetApi.INFINITY:
                fields = {"input": list(texts), "encoding_format": self.encoding}
            case TargetApi.TEI:
                # Without it, a text that is too long for the model is an error.
                fields = {"inputs": list(texts), "truncate": True}
            case TargetApi.OLLAMA:
                fields = {"input": list(texts), "truncate": True}
            case TargetApi.RERANK:
                fields = {"query": query, "documents": list(texts)}
        return orjson.dumps(fields if self.model is None else {"model": self.model, **fields})

    def query_body(self, query: str) -> bytes:
        """The smallest request that a person's search makes: one query, with `rerank` against one document."""
        return self.body((query,), query)


def tokens_of(content: bytes, headers: Mapping[str, str]) -> int | None:
    """The tokens that the server says it computed; None where it does not say."""
    return _number(TOKENS, content, headers.get(TOKENS_HEADER, ""))


def cached_of(content: bytes, headers: Mapping[str, str]) -> int | None:
    """Those of the tokens whose vectors came from a cache; None where the server does not say."""
    return _number(CACHED, content, headers.get(CACHED_HEADER, ""))


def _number(pattern: re.Pattern[bytes], content: bytes, header: str) -> int | None:
    match = pattern.search(content[-ENDS_BYTES:]) or pattern.search(content[:ENDS_BYTES])
    if match:
        return int(match[1])
    return int(header) if COUNT.fullmatch(header) else None


def dimensions_of(content: bytes, dialect: TargetApi, texts: int) -> int | None:
    """The size of the vectors; None for scores.

    Raises:
        BadAnswer: it is not one vector or score for each text, or the vectors differ in size.
    """
    try:
        entries = _entries(orjson.loads(content), dialect)
        sizes = {_size(entry) for entry in entries} if dialect is not TargetApi.RERANK else set()
    except (ValueError, KeyError, TypeError, Base64Error) as error:
        raise BadAnswer(f"The answer is not one of the dialect {dialect}: {start_of(content)}") from error
    if len(entries) != texts:
        kind = "scores" if dialect is TargetApi.RERANK else "vectors"
        raise BadAnswer(f"{texts} texts were sent and {len(entries)} {kind} came back.")
    if dialect is TargetApi.RERANK:
        return None
    if len(sizes) != 1 or 0 in sizes:
        raise BadAnswer(f"The vectors that came back have {sorted(sizes)} values; one size above 0 was expected.")
    return sizes.pop()


def _entries(answer: Any, dialect: TargetApi) -> list[Any]:
    match dialect:
        case TargetApi.OPENAI | TargetApi.INFINITY:
            return [entry["embedding"] for entry in answer["data"]]
        case TargetApi.TEI:
            return list(answer)
        case TargetApi.OLLAMA:
            return list(answer["embeddings"])
        case TargetApi.RERANK:
            return [entry["relevance_score"] for entry in answer["results"]]


def _size(vector: Any) -> int:
    return len(b64decode(vector, validate=True)) // FLOAT_BYTES if isinstance(vector, str) else len(vector)
