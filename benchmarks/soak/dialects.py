"""What a soak's clients send, in the words of each dialect, and whether the answer is what its texts give alone."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from benchmarks.lib.minilm import sample_texts
from benchmarks.soak.wire import Call, Connection, Reply

TEXTS, QUERIES, DOCUMENTS = 400, 12, 5
SHORTEST, LONGEST = 40, 400  # characters
NEW_ONE_IN = 20  # requests have a text that was never sent before
NEW_KEPT = 200  # of those, compared with what they give alone when the load is over
UNCACHED = 0.8  # of the requests stay out of the cache
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """What docs/models.md allows, of unit vectors and of relevance scores."""

    value: float | None
    """Of each value of a vector; None: the cosine counts."""
    cosine: float
    score: float

    @classmethod
    def of(cls, dtype: str) -> Tolerance:
        """That of all-MiniLM-L6-v2 in this dtype."""
        return cls(1e-5, 0.0, 1e-5) if dtype == "float32" else cls(None, 0.9995, 0.03)


@dataclass
class Comparison:
    """How many results were compared with those of the same text alone, and how far off the worst was."""

    tolerance: Tolerance
    vectors: int = 0
    scores: int = 0
    wrong: int = 0
    lowest_cosine: float = 1.0
    largest_value: float = 0.0
    largest_score: float = 0.0

    def vectors_are(self, got: Any, wanted: Vectors) -> bool:
        """Whether the rows are those of the texts alone, in their order."""
        self.vectors += len(wanted)
        rows = np.asarray(got, dtype=np.float32)
        if rows.shape != wanted.shape or not np.isfinite(rows).all():
            self.wrong += len(wanted)
            return False
        cosines = (rows * wanted).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1)
        off = np.abs(rows - wanted).max(axis=1)
        self.lowest_cosine = min(self.lowest_cosine, float(cosines.min()))
        self.largest_value = max(self.largest_value, float(off.max()))
        most = self.tolerance.value
        wrong = int((cosines < self.tolerance.cosine).sum() if most is None else (off > most).sum())
        self.wrong += wrong
        return not wrong

    def scores_are(self, got: Mapping[int, float], wanted: Sequence[float]) -> bool:
        """Whether each document has the score that it has alone."""
        self.scores += len(wanted)
        if got.keys() != set(range(len(wanted))):
            self.wrong += len(wanted)
            return False
        off = [abs(got[place] - score) for place, score in enumerate(wanted)]
        self.largest_score = max(self.largest_score, *off)
        wrong = sum(each > self.tolerance.score for each in off)
        self.wrong += wrong
        return not wrong


@dataclass(frozen=True)
class Exchange:
    """A call, and what its answer has to be."""

    dialect: str
    call: Call
    right: Callable[[Reply], bool] = lambda reply: True
    statuses: frozenset[int] = frozenset({200})


class Corpus:
    """The texts of a soak and what each of them gives alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.texts = [text[: self.random.randint(SHORTEST, LONGEST)] for text in sample_texts(TEXTS)]
        self.queries = [f"How does {text.split('(')[0][4:60]} work?" for text in self.texts[:QUERIES]]
        self.documents = [self.random.sample(range(TEXTS), DOCUMENTS) for _ in self.queries]
        self.vectors: Vectors = np.empty((0, 0), dtype=np.float32)
        self.scores: list[list[float]] = []
        self.kept: list[tuple[str, Vectors]] = []
        self._numbers = count()
        self._asides = cycle(ASIDE)  # each comes up, however few requests there are

    async def learn(self, connection: Connection) -> float:
        """Ask for every text alone, and for every document of every query alone, of a server that does nothing else.

        Returns: the requests that it answered a second.
        """
        began = perf_counter()
        self.vectors = np.stack([await vector_alone(connection, text) for text in self.texts])
        for query, places in zip(self.queries, self.documents, strict=True):
            alone = [await _score_alone(connection, query, self.texts[place]) for place in places]
            self.scores.append(alone)
        return (TEXTS + QUERIES * DOCUMENTS) / (perf_counter() - began)

    def chosen(self, most: int) -> list[int]:
        """Places of some texts, mostly few."""
        return [self.random.randrange(TEXTS) for _ in range(min(most, 1 + int(self.random.expovariate(0.7))))]

    def exchange(self, comparison: Comparison) -> Exchange:
        """The next request of somebody, in any dialect."""
        if self.random.random() < 1 / NEW_ONE_IN:
            return self._new_text()
        if self.random.random() < 0.2:
            return self._rerank(comparison)
        if self.random.random() < 0.1:
            return self._aside(comparison)
        dialect = self.random.choice(list(EMBED))
        path, body, read = EMBED[dialect]
        places = self.chosen(8)
        headers = {"cache_control": "no-store"} if self.random.random() < UNCACHED else {}
        if dialect == "CodeCartographer, bytes":
            headers["accept"] = "application/octet-stream"
        call = Call.json(path, body([self.texts[place] for place in places]), **headers)
        wanted = self.vectors[places]
        return Exchange(dialect, call, lambda reply: comparison.vectors_are(read(reply), wanted))

    def large(self) -> Call:
        """A request whose answer does not fit into one packet."""
        return Call.json("/v1/embeddings", {"input": [self.texts[place] for place in range(16)], "model": "any"})

    def _rerank(self, comparison: Comparison) -> Exchange:
        dialect = self.random.choice(list(RERANK))
        path, body, read = RERANK[dialect]
        number = self.random.randrange(QUERIES)
        call = Call.json(path, body(self.queries[number], [self.texts[place] for place in self.documents[number]]))
        return Exchange(dialect, call, lambda reply: comparison.scores_are(read(reply), self.scores[number]))

    def _new_text(self) -> Exchange:
        """A text that nobody sent before; some of the answers are kept, to be compared at the end."""
        number = next(self._numbers)
        text = f"{number} {self.random.choice(self.texts)}"

        def keep(reply: Reply) -> bool:
            vector = np.asarray(reply.json()["data"][0]["embedding"], dtype=np.float32)
            place = number if number < NEW_KEPT else self.random.randrange(number + 1)  # each is as likely to be kept
            if len(self.kept) < NEW_KEPT:
                self.kept.append((text, vector))
            elif place < NEW_KEPT:
                self.kept[place] = (text, vector)
            return bool(np.isfinite(vector).all())

        return Exchange("OpenAI, new text", Call.json("/v1/embeddings", {"input": text, "model": "any"}), keep)

    def _aside(self, comparison: Comparison) -> Exchange:
        return next(self._asides)(self, comparison)


async def vector_alone(connection: Connection, text: str) -> Vectors:
    """The unit vector of the text, which is in no batch with any other, float32, shape (dimensions,)."""
    reply = await connection.send(
        Call.json("/v1/embeddings", {"input": text, "model": "any"}, cache_control="no-store")
    )
    return np.asarray(_answered(reply)["data"][0]["embedding"], dtype=np.float32)


async def _score_alone(connection: Connection, query: str, document: str) -> float:
    body = {"query": query, "documents": [document]}
    reply = await connection.send(Call.json("/v1/rerank", body, cache_control="no-store"))
    return float(_answered(reply)["results"][0]["relevance_score"])


def _answered(reply: Reply) -> Any:
    if reply.status != 200:
        raise RuntimeError(f"status {reply.status}: {reply.content[:300]!r}")
    return reply.json()


def _data(reply: Reply) -> Any:
    return [entry["embedding"] for entry in reply.json()["data"]]


def _base64(reply: Reply) -> Any:
    return [np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in _data(reply)]


def _bytes(reply: Reply) -> Any:
    rows, dimensions = map(int, reply.headers["x-embedding-shape"].split(","))
    return np.frombuffer(reply.content, dtype="<f4").reshape(rows, dimensions)


# By name: the path, the body of some texts, and the vectors of the answer.
EMBED: dict[str, tuple[str, Callable[[list[str]], Any], Callable[[Reply], Any]]] = {
    "OpenAI": ("/v1/embeddings", lambda texts: {"input": texts, "model": "any"}, _data),
    "OpenAI, base64": (
        "/v1/embeddings",
        lambda texts: {"input": texts, "model": "any", "encoding_format": "base64"},
        _base64,
    ),
    "Jina": (
        "/v1/embeddings",
        lambda texts: {"input": [{"text": text} for text in texts], "normalized": True, "truncate": True},
        _data,
    ),
    "NIM": (
        "/v1/embeddings",
        lambda texts: {"input": texts, "model": "any-passage", "input_type": "passage", "truncate": "END"},
        _data,
    ),
    "Cohere": ("/v2/embed", lambda texts: {"texts": texts}, lambda reply: reply.json()["embeddings"]["float"]),
    "TEI": ("/embed", lambda texts: {"inputs": texts, "normalize": True, "truncate": True}, Reply.json),
    "CodeCartographer": ("/embed", lambda texts: {"inputs": texts, "is_query": False}, Reply.json),
    "CodeCartographer, bytes": ("/embed", lambda texts: {"inputs": texts, "is_query": False}, _bytes),
    "Ollama": ("/api/embed", lambda texts: {"model": "any", "input": texts}, lambda reply: reply.json()["embeddings"]),
}


def _by_index(results: Sequence[Mapping[str, Any]], score: str) -> dict[int, float]:
    return {int(result["index"]): float(result[score]) for result in results}


# By name: the path, the body of a query with its documents, and the scores of the answer by the documents' places.
RERANK: dict[str, tuple[str, Callable[[str, list[str]], Any], Callable[[Reply], Mapping[int, float]]]] = {
    "Cohere, rerank": (
        "/v2/rerank",
        lambda query, documents: {"query": query, "documents": documents},
        lambda reply: _by_index(reply.json()["results"], "relevance_score"),
    ),
    "Jina, rerank": (
        "/v1/rerank",
        lambda query, documents: {"query": query, "documents": documents, "top_n": len(documents), "model": "any"},
        lambda reply: _by_index(reply.json()["results"], "relevance_score"),
    ),
    "TEI, rerank": (
        "/rerank",
        lambda query, documents: {"query": query, "texts": documents},
        lambda reply: _by_index(reply.json(), "score"),
    ),
}


def _get(path: str) -> Callable[[Corpus, Comparison], Exchange]:
    return lambda corpus, comparison: Exchange(f"GET {path}", Call("GET", path))


def _refused(what: str, call: Call, status: int) -> Callable[[Corpus, Comparison], Exchange]:
    return lambda corpus, comparison: Exchange(f"refused: {what}", call, statuses=frozenset({status}))


# What else clients send: questions about the server, and mistakes, each with the status that it has to get.
ASIDE: Sequence[Callable[[Corpus, Comparison], Exchange]] = (
    _get("/v1/models"),
    _get("/capabilities"),
    _get("/info"),
    _get("/api/tags"),
    _get("/jobs"),
    _get("/v1/health/ready"),
    _refused("no JSON", Call("POST", "/v1/embeddings", b"{", {"content-type": "application/json"}), 400),
    _refused("no input", Call.json("/embed", {"inputs": 7}), 422),
    _refused("dimensions", Call.json("/v1/embeddings", {"input": "x", "dimensions": 7}), 400),
    _refused("no key", Call.json("/v1/embeddings", {"input": "x"}, authorization="Bearer nobody"), 401),
    _refused("no path", Call("GET", "/nowhere"), 404),
)
