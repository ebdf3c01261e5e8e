"""Which server is measured, and how its dialect is spoken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import orjson


class Dialect(StrEnum):
    """The API that requests are written in."""

    OPENAI = "openai"
    INFINITY = "infinity"
    TEI = "tei"
    RERANK = "rerank"


class Encoding(StrEnum):
    """How vectors are to come back, where the dialect lets the client choose (openai, infinity)."""

    BASE64 = "base64"
    FLOAT = "float"


PATHS = {
    Dialect.OPENAI: "/v1/embeddings",
    Dialect.INFINITY: "/embeddings",
    Dialect.TEI: "/embed",
    Dialect.RERANK: "/v1/rerank",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address, its dialect, and what goes into every request."""

    url: str
    """With or without `http://`, and for openai and rerank with or without `/v1`."""
    dialect: Dialect = Dialect.OPENAI
    model: str | None = None
    """Left out of the requests where None: the server's default."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    encoding: Encoding = Encoding.BASE64

    @property
    def endpoint(self) -> str:
        """The address that requests go to."""
        base = self.url if "://" in self.url else f"http://{self.url}"
        base = base.rstrip("/")
        path = PATHS[self.dialect]
        if path.startswith("/v1/"):
            base = base.removesuffix("/v1")
        return base + path

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        # Compression would cost both sides time and says nothing about the model.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def body(self, texts: Sequence[str], query: str) -> bytes:
        """A request for the texts' vectors, or with `rerank` for the texts' scores against the query."""
        fields: dict[str, object]
        match self.dialect:
            case Dialect.OPENAI | Dialect.INFINITY:
                fields = {"input": list(texts), "encoding_format": self.encoding}
            case Dialect.TEI:
                # Without it, a text that is too long for the model is an error.
                fields = {"inputs": list(texts), "truncate": True}
            case Dialect.RERANK:
                fields = {"query": query, "documents": list(texts)}
        return orjson.dumps(fields if self.model is None else {"model": self.model, **fields})

    def query_body(self, query: str) -> bytes:
        """The smallest request that a person's search makes: one query, with `rerank` against one document."""
        return self.body((query,), query)
