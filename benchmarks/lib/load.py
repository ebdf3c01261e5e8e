"""Sends texts to a server over several connections with the client of `vecmill bench`, and reads the vectors."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vecmill.tools.bench import target as targets
from vecmill.tools.bench.load_generator import Bulk, BulkLoad, TargetClient, run
from vecmill.tools.bench.target import BenchTarget, Payload
from vecmill.tools.http_client import Answer

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dialect:
    """One endpoint's request and answer."""

    kind: targets.TargetApi
    body: Callable[[Sequence[str]], dict[str, Any]]
    vectors: Callable[[bytes], Vectors]
    """(texts, dimensions) in the texts' order, from the body of an answer."""


def tei(*, is_query: bool = False) -> Dialect:
    """text-embeddings-inference: POST /embed, answered with a bare list of lists of floats."""
    return Dialect(
        targets.TargetApi.TEI,
        body=lambda texts: {"inputs": list(texts), "is_query": is_query},
        vectors=lambda answer: np.asarray(json.loads(answer), dtype=np.float32),
    )


def openai(model: str, kind: targets.TargetApi = targets.TargetApi.OPENAI, **more: Any) -> Dialect:
    """OpenAI's embeddings, in base64: less to write and to read than decimal digits. `more` goes into each body."""
    return Dialect(
        kind,
        body=lambda texts: {"input": list(texts), "model": model, "encoding_format": "base64", **more},
        vectors=_openai_vectors,
    )


def _openai_vectors(answer: bytes) -> Vectors:
    rows = sorted(json.loads(answer)["data"], key=lambda row: int(row["index"]))
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in rows])


TEI = tei()


@dataclass(frozen=True)
class Answered:
    """The texts' vectors in their order, float32, shape (texts, dimensions), and the time for all of them."""

    vectors: Vectors
    seconds: float


class _Keeping(TargetClient):
    """A client that keeps the content of each answer, by the body it answers."""

    def __init__(self, target: BenchTarget, connections: int) -> None:
        super().__init__(target, connections)
        self.contents: dict[bytes, bytes] = {}

    async def post(self, body: bytes, due: float | None = None) -> Answer:
        answer = await super().post(body, due)
        if answer.error is not None:
            raise RuntimeError(f"POST {self.target.endpoint}: {answer.error} {answer.message[:500]}")
        self.contents[body] = answer.content
        return answer


def embed_all(
    url: str,
    texts: Sequence[str],
    *,
    connections: int = 1,
    batch: int = 32,
    dialect: Dialect = TEI,
    advance: Callable[[int], None] = lambda texts: None,
) -> Answered:
    """Embed the texts in batches over so many connections. RuntimeError for an answer that is an error.

    Each connection sends its next batch when its last one is answered; `advance` then gets that batch's size.
    """
    parts = [texts[start : start + batch] for start in range(0, len(texts), batch)]
    requests = [
        Payload(json.dumps(dialect.body(part)).encode(), len(part), sum(len(text.encode()) for text in part))
        for part in parts
    ]

    async def send() -> tuple[BulkLoad, dict[bytes, bytes]]:
        async with _Keeping(BenchTarget(url, dialect.kind, cached=True), connections) as client:
            return await Bulk(client, requests, advance).run(connections), client.contents

    load, contents = run(send())
    # Parsed after the clock stopped: the client's own work is not the server's.
    return Answered(np.concatenate([dialect.vectors(contents[each.body]) for each in requests]), load.seconds)
