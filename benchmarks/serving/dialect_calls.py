"""A request of each dialect for the same texts, as its own clients send it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

CLIENTS_HEADERS = ((b"host", b"localhost"), (b"content-type", b"application/json"), (b"user-agent", b"benchmark"))


@dataclass(frozen=True)
class Call:
    """What is sent."""

    name: str
    path: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = CLIENTS_HEADERS


def dialect_calls(texts: Sequence[str]) -> list[Call]:
    """Embedding in each dialect that takes several texts at once, and reranking in each.

    Two more ask for gzip, as clients built on httpx or requests do wherever they take floats.
    """
    query, passages = "parse an ISO 8601 date", [{"text": text} for text in texts]
    by_type = ["float", "int8", "ubinary", "base64"]
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("OpenAI, base64", "/v1/embeddings", {"model": "m", "input": texts, "encoding_format": "base64"}),
        ("OpenAI, float", "/v1/embeddings", {"model": "m", "input": texts}),
        ("Jina, binary", "/v1/embeddings", {"model": "m", "input": texts, "embedding_type": "binary"}),
        ("Voyage, int8", "/v1/embeddings", {"model": "m", "input": texts, "output_dtype": "int8"}),
        ("Cohere v2, float", "/v2/embed", {"model": "m", "texts": texts, "input_type": "search_document"}),
        ("Cohere v2, four types", "/v2/embed", {"model": "m", "texts": texts, "embedding_types": by_type}),
        ("TEI", "/embed", {"inputs": texts, "truncate": True}),
        ("TEI, POST /", "/", {"inputs": texts}),
        ("Ollama", "/api/embed", {"model": "m", "input": texts}),
        ("llama-server", "/embedding", {"content": texts}),
        ("Cohere v2 rerank", "/v2/rerank", {"model": "m", "query": query, "documents": texts}),
        ("Jina rerank, documents back", "/v1/rerank", {"query": query, "documents": texts, "return_documents": True}),
        ("TEI rerank", "/rerank", {"query": query, "texts": texts}),
        ("NIM ranking", "/v1/ranking", {"query": {"text": query}, "passages": passages}),
        ("vLLM score", "/score", {"text_1": query, "text_2": texts}),
    ]
    calls = [Call(name, path, orjson.dumps(body)) for name, path, body in bodies]
    gzip = (*CLIENTS_HEADERS, (b"accept-encoding", b"gzip, deflate"))
    compressed = [
        replace(call, name=f"{call.name}, gzip", headers=gzip)
        for call in calls
        if call.name in ("OpenAI, float", "TEI")
    ]
    return [*calls, *compressed]
