"""Requests of each size, vector width and encoding in turns, and how long others waited meanwhile."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import orjson
from benchmarks.rounds import in_turns
from benchmarks.timed_http import Connection, Timed, polled

PATH = "/v1/embeddings"
ENCODINGS = ("float", "base64")
FLOAT32_IN_BASE64 = 4 / 3 * 4  # characters
QUIET_SECONDS = 1.0
PARTS = {"x-inference-time": "inference", "x-queue-time": "queue", "x-tokenization-time": "tokenization"}


@dataclass(frozen=True)
class Case:
    """One kind of request."""

    model: str
    dimensions: int
    texts: int
    encoding: str
    gzip: bool
    """Whether the client takes compressed answers."""

    def __str__(self) -> str:
        return f"{self.texts} x {self.dimensions} {self.encoding}{' gzip' if self.gzip else ''}"

    def body(self) -> bytes:
        """Short texts, all different: equal ones are computed once."""
        texts = [f"text {number}" for number in range(self.texts)]
        return json.dumps({"model": self.model, "input": texts, "encoding_format": self.encoding}).encode()

    def headers(self) -> dict[str, str]:
        """Of the request."""
        return {
            "Content-Type": "application/json",
            "Accept-Encoding": "gzip" if self.gzip else "identity",
        }


@dataclass
class Measured:
    """Of one case, each round's median in milliseconds, by what the time was spent on."""

    parts: dict[str, list[float]] = field(default_factory=dict)
    answer_bytes: int = 0
    others_p99: list[float] = field(default_factory=list)
    others_longest: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How often."""

    rounds: int
    repeats: int
    """Of each case in each round."""
    large_repeats: int
    """The same for the largest number of texts."""
    sizes: Sequence[int]
    """Texts per request."""


@dataclass
class Found:
    """By case, and what others waited while nothing else was asked."""

    cases: dict[Case, Measured] = field(default_factory=dict)
    quiet_p99: list[float] = field(default_factory=list)
    quiet_longest: list[float] = field(default_factory=list)


def cases(models: dict[int, str], sizes: Sequence[int]) -> list[Case]:
    """All there are; `models` by the dimensions of their vectors."""
    return [
        Case(models[dimensions], dimensions, texts, encoding, gzip)
        for dimensions, texts, encoding, gzip in product(sorted(models), sizes, ENCODINGS, (False, True))
    ]


def measure_rounds(url: str, models: dict[int, str], plan: Plan, advance: Callable[[int], None]) -> Found:
    """Every case in each round, the order turned round from one to the next; `advance` is told of each."""
    found = Found({case: Measured() for case in cases(models, plan.sizes)})
    connection = Connection(url)
    for case, measured in found.cases.items():
        measured.answer_bytes = _checked(case, connection.send("POST", PATH, case.body(), case.headers()))
    for _ in range(plan.rounds):
        with polled(url) as polls:
            time.sleep(QUIET_SECONDS)
        _add_waits(polls.milliseconds, found.quiet_p99, found.quiet_longest)
    for case in in_turns(list(found.cases), plan.rounds):
        _round(url, connection, case, found.cases[case], plan, watched=case.texts == max(plan.sizes))
        advance(1)
    connection.close()
    return found


def _checked(case: Case, answer: Timed) -> int:
    """The size of the answer, which must hold what was asked for."""
    rows = orjson.loads(answer.body())["data"]
    expected = case.dimensions if case.encoding == "float" else round(case.dimensions * FLOAT32_IN_BASE64)
    if len(rows) != case.texts or abs(len(rows[0]["embedding"]) - expected) > 3:
        raise RuntimeError(f"{case}: the answer has {len(rows)} vectors of {len(rows[0]['embedding'])}")
    return len(answer.content)


def _round(url: str, connection: Connection, case: Case, measured: Measured, plan: Plan, *, watched: bool) -> None:
    body, headers = case.body(), case.headers()
    found: list[dict[str, float]] = []
    waits: list[float] = []
    for _ in range(plan.large_repeats if watched else plan.repeats):
        if watched:
            with polled(url) as polls:
                found.append(_parts(connection.send("POST", PATH, body, headers)))
            waits += polls.milliseconds
        else:
            found.append(_parts(connection.send("POST", PATH, body, headers)))
    for name in found[0]:
        measured.parts.setdefault(name, []).append(statistics.median(one[name] for one in found))
    if watched:
        _add_waits(waits, measured.others_p99, measured.others_longest)


def _parts(answer: Timed) -> dict[str, float]:
    """Milliseconds by what they were spent on; `rest` is HTTP, encoding, and the client's own reading."""
    parts = {name: float(answer.headers[header]) for header, name in PARTS.items()}
    outside = answer.milliseconds - parts["inference"]
    rest = outside - parts["queue"] - parts["tokenization"]
    return {"whole": answer.milliseconds, "outside": outside, "rest": rest, **parts}


def _add_waits(milliseconds: Sequence[float], p99: list[float], longest: list[float]) -> None:
    if milliseconds:
        p99.append(float(np.percentile(milliseconds, 99)))
        longest.append(max(milliseconds))


def described(case: Case) -> dict[str, Any]:
    """What JSON says of a case."""
    return {
        "texts": case.texts,
        "dimensions": case.dimensions,
        "encoding": case.encoding,
        "gzip": case.gzip,
    }
