"""What each dialect costs: parsing a request of 64 texts and encoding its answer, without the model and the sockets.

The real application is called through ASGI, one request at a time, with results that lie ready in place of the model's.
So the time is that of everything HTTP does in this process: middleware, routing, JSON, validation, dialect, encoding
in a thread. Beside it stands the limit of this machine: parsing and serialising the same bytes with orjson and nothing
else. The dialects take turns.

    python -m benchmarks.serving.dialect_cost
    python -m benchmarks.serving.dialect_cost --texts 64 --dimensions 384 --rounds 5

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import asyncio
import gzip
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
from benchmarks.lib.figures import in_turns, judged, print_disturbance, rounded, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import sample_texts
from benchmarks.lib.results import progress, publish
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table
from starlette.types import Message

from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.core.types import EmbedRequest, EmbedResult, ScoreRequest, ScoreResult, Timings
from vecmill.inference.facade import Inference

CLIENTS_HEADERS = ((b"host", b"localhost"), (b"content-type", b"application/json"), (b"user-agent", b"benchmark"))
MOST_MS = 2.0
GZIP_MAGIC = b"\x1f\x8b"
TIMINGS = Timings(0.001, 0.0, 0.05)


@dataclass(frozen=True)
class Call:
    """One call that is sent."""

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


class Ready:
    """Answers at once, with random vectors and scores: the model is not what is measured."""

    def __init__(self, texts: int, dimensions: int) -> None:
        generator = np.random.default_rng(0)
        vectors = generator.standard_normal((texts, dimensions), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self._embedded = EmbedResult(vectors, "model", 100 * texts, (), TIMINGS)
        self._scored = ScoreResult(generator.random(texts), "model", "cosine", 100 * texts, (), TIMINGS)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        assert len(request.inputs) == len(self._embedded.embeddings)
        return self._embedded

    async def score(self, request: ScoreRequest) -> ScoreResult:
        assert len(request.documents) == len(self._scored.scores)
        return self._scored


def application(texts: int, dimensions: int) -> FastAPI:
    """The real application without its lifespan, so that no model is loaded."""
    app = create_app(load_settings({}))
    inference: Inference = app.state.services.inference
    ready = Ready(texts, dimensions)
    inference.embed = ready.embed  # type: ignore[method-assign]
    inference.score = ready.score  # type: ignore[method-assign]
    return app


async def ask(app: FastAPI, call: Call) -> tuple[float, bytes]:
    """Milliseconds until the answer is out, and its body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": b"",
        "headers": list(call.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }
    sent: list[Message] = []
    waiting = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()  # the client stays until it is answered
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    started = time.perf_counter()
    await app(scope, receive, send)
    taken = 1000 * (time.perf_counter() - started)
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] == 200, body[:500]
    return taken, body


def limit(call: Call, answer: bytes) -> float:
    """Milliseconds that orjson alone takes to parse the request and to serialise what the answer holds."""
    answered = orjson.loads(gzip.decompress(answer) if answer[:2] == GZIP_MAGIC else answer)
    started = time.perf_counter()
    orjson.loads(call.body)
    orjson.dumps(answered)
    return 1000 * (time.perf_counter() - started)


async def measure(calls: Sequence[Call], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each dialect in each round: the median of its repeats."""
    app = application(options.texts, options.dimensions)
    times: dict[str, list[float]] = {call.name: [] for call in calls}
    limits: dict[str, list[float]] = {call.name: [] for call in calls}
    sizes: dict[str, int] = {}
    for call in calls:
        sizes[call.name] = len((await ask(app, call))[1])
    with progress("requests", options.rounds * len(calls)) as advance:
        for call in in_turns(calls, options.rounds):
            answers = [await ask(app, call) for _ in range(options.repeats)]
            times[call.name].append(statistics.median(taken for taken, _ in answers))
            limits[call.name].append(statistics.median(limit(call, answer) for _, answer in answers))
            advance(1)
    return {
        call.name: {
            "path": call.path,
            "request_bytes": len(call.body),
            "answer_bytes": sizes[call.name],
            "ms": judged(spread(times[call.name]), MOST_MS),
            "orjson_alone_ms": spread(limits[call.name]),
            "over_orjson": spread([a / b for a, b in zip(times[call.name], limits[call.name], strict=True)]),
        }
        for call in calls
    }


def print_summary(results: dict[str, dict[str, Any]], options: argparse.Namespace, other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    title = f"{options.texts} texts, {options.dimensions} dimensions: ms of parsing and encoding, median (min to max)"
    table = Table(title=title, title_justify="left")
    for heading in ("dialect", "path", "ms", "orjson alone", "times orjson", "request kB", "answer kB"):
        table.add_column(heading, justify="left" if heading in ("dialect", "path") else "right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            result["path"],
            shown({key: result["ms"][key] for key in ("median", "min", "max")}),
            rounded(result["orjson_alone_ms"]["median"]),
            shown(result["over_orjson"]),
            rounded(result["request_bytes"] / 1000),
            rounded(result["answer_bytes"] / 1000),
        )
    console.print(table)
    slowest = max(results, key=lambda name: results[name]["ms"]["median"])
    console.print(f"slowest: {slowest}, {shown(results[slowest]['ms'], ' ms')}", soft_wrap=True)
    print_disturbance(console, other_cores)


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64, help="per request (default: %(default)s)")
    parser.add_argument("--dimensions", type=int, default=384, help="of a vector (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=40, help="of each dialect in a round (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args()
    calls = dialect_calls(sample_texts(options.texts))
    with watched() as contention:
        results = asyncio.run(measure(calls, options))
    print_summary(results, options, contention.other_cores)
    settings = {key: getattr(options, key) for key in ("texts", "dimensions", "rounds", "repeats")}
    result = {"host": describe_host(), "settings": settings, "dialects": results}
    publish("dialect_cost", {**result, "other_cores": round(contention.other_cores, 3)}, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
