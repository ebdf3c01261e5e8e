"""The sequences that wait to be run, the lines they stand in, whose turn it is, and how much waits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from vecmill.core.errors import VecmillError
from vecmill.core.types import Lane, Prefix, Row, Vector
from vecmill.scheduler.policy import Budget, Cut, TurnTaker, WaitingLine

MOST_CLIENTS = 1024  # remembered though nothing of theirs waits
MOST_JOBS = 64  # that a client's turns are divided among; those beyond share one part
JOBS_BEYOND = "\0beyond"


@dataclass(eq=False, slots=True)
class Sharing(TurnTaker):
    """A client, whose jobs take turns in what it gets."""

    jobs: dict[str, TurnTaker] = field(default_factory=dict)
    """Those with something waiting, and those that had lately."""


class WaitingLines:
    """Every line in which something waits."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, Lane, str, str], WaitingLine[Sequence]] = {}
        self._clients: dict[tuple[Lane, str], Sharing] = {}

    def __iter__(self) -> Iterator[WaitingLine[Sequence]]:
        return iter(self._lines.values())

    def waits(self, lane: Lane) -> bool:
        """Whether anything waits in a lane."""
        return any(line.lane is lane for line in self._lines.values())

    def join(self, model: str, lane: Lane, client: str, now: float, job: str = "") -> WaitingLine[Sequence]:
        """The line of a client's job, made if need be. The caller must append a sequence: empty lines are dropped."""
        key = model, lane, client, job
        if key not in self._lines:
            sharing = self._client(lane, client)
            part = self._job(sharing, job)
            self._lines[key] = WaitingLine(model, lane, sharing, now, job=part)
        return self._lines[key]

    def _client(self, lane: Lane, name: str) -> Sharing:
        """A client that comes (back) begins level with the one served least: time away earns no turns."""
        active = {line.client for line in self._lines.values() if line.lane is lane}
        client = self._clients.pop((lane, name), None) or Sharing()
        self._clients[lane, name] = client  # the last of those that would be forgotten
        if client not in active:
            _level(client, active)
            client.jobs.clear()
            self._forget(active | {client}, lane)
        return client

    def _forget(self, active: set[TurnTaker], lane: Lane) -> None:
        """Drop the clients that have been away longest."""
        excess = len(self._clients) - MOST_CLIENTS
        if excess > 0:
            away = [key for key, client in self._clients.items() if key[0] is lane and client not in active]
            for key in away[:excess]:
                del self._clients[key]

    def _job(self, client: Sharing, name: str) -> TurnTaker:
        """The part of a client's turns that a job has; beyond MOST_JOBS all further jobs have one together."""
        active = {line.job for line in self._lines.values() if line.client is client}
        client.jobs = {key: job for key, job in client.jobs.items() if job in active or key == name}
        if name not in client.jobs and len(client.jobs) >= MOST_JOBS:
            name = JOBS_BEYOND
        job = client.jobs.setdefault(name, TurnTaker())
        if job not in active:
            _level(job, active)
        return job

    def leave(self, cut: Cut[Sequence], now: float) -> None:
        """Take a batch off the fronts."""
        for line, count in cut.popped.items():
            for _ in range(count):
                line.waiting.popleft()
            line.front_since = now
        for client, tokens in cut.served.items():
            client.served += tokens
            client.served_at = now
        self._lines = {key: line for key, line in self._lines.items() if line.waiting}

    def clear(self) -> list[Sequence]:
        """Everything that waits, once for each line it stands in; the lines are gone."""
        waiting = [sequence for line in self._lines.values() for sequence in line.waiting]
        self._lines.clear()
        return waiting


def _level(client: TurnTaker, active: Iterable[TurnTaker]) -> None:
    client.served = max(client.served, min((other.served for other in active), default=0.0))


class Backlog:
    """Rows and tokens that wait, by model and by the lane of their first submitter."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, Lane]] = Counter()
        self.tokens: Counter[tuple[str, Lane]] = Counter()
        self._prefixes: Counter[int] = Counter()

    def add(self, model: str, lane: Lane, sequences: Collection[Sequence]) -> None:
        """More wait."""
        self._count(model, lane, sequences, 1)

    def remove(self, model: str, lane: Lane, sequences: Collection[Sequence]) -> None:
        """They wait no longer."""
        self._count(model, lane, sequences, -1)

    def fills(self, model: str, budget: Budget) -> bool:
        """Whether a whole forward pass of a model waits."""
        rows, tokens = (sum(counts[model, lane] for lane in Lane) for counts in (self.rows, self.tokens))
        return tokens >= budget.max_batch_tokens or rows >= budget.max_batch_size

    def _count(self, model: str, lane: Lane, sequences: Collection[Sequence], sign: int) -> None:
        self.rows[model, lane] += sign * len(sequences)
        tokens = sum([sequence.tokens for sequence in sequences])
        tokens -= sum([self._repeated(each.prefix, sign) for each in sequences if each.prefix is not None])
        self.tokens[model, lane] += sign * tokens

    def _repeated(self, prefix: Prefix, sign: int) -> int:
        """Tokens that do not count: a prefix that several share is computed once."""
        self._prefixes[id(prefix)] += sign
        shared = self._prefixes[id(prefix)]
        if not shared:
            del self._prefixes[id(prefix)]
        return 0 if shared == (1 if sign > 0 else 0) else len(prefix)


class SequenceResult(NamedTuple):
    """What a sequence's future resolves to."""

    vector: Vector
    queue_seconds: float
    """From submission to the start of its batch."""


Keep = Callable[[list[tuple[bytes, Vector]]], None]
"""Given the vectors of a batch, each with the key that its sequence was submitted with."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A row, the model that runs it, and the futures of everyone who waits for it: equal rows run once.

    `submitted` is when the first of them came; whoever joins later does not change it.
    """

    row: Row
    model: str
    key: Hashable
    """Equal for rows that give the same vector."""
    lane: Lane
    """Of the first of them."""
    tokens: int
    """Of the row."""
    prefix: Prefix | None
    """Leading tokens that other sequences of its request share."""
    submitted: float = field(default_factory=monotonic)
    deadline: float = float("-inf")
    """The latest of all who wait; by the monotonic clock."""
    futures: list[asyncio.Future[SequenceResult]] = field(default_factory=list)
    keep: tuple[Keep, bytes] | None = None
    """What is given the vector as well, even if nobody waits any more, and under which key."""
    stands_in: set[tuple[Lane, str, str]] = field(default_factory=set)
    """Lane, client and job of each line that it waits in: one for each who asked for it."""
    taken: bool = False
    """In a batch, or dropped, though it may still stand in other lines."""

    def __len__(self) -> int:
        return self.tokens

    def join(self, future: asyncio.Future[SequenceResult], deadline: float) -> None:
        """Add one more who waits."""
        self.futures.append(future)
        if deadline > self.deadline:
            self.deadline = deadline

    def unwanted(self, now: float) -> bool:
        """Not to be run: it has been taken, nobody waits any more, or every deadline has passed."""
        if self.taken or now >= self.deadline:
            return True
        if len(self.futures) == 1:  # of nearly all: making a generator takes longer than asking
            return self.futures[0].done()
        return all(future.done() for future in self.futures)

    def resolve(self, result: SequenceResult | Exception) -> None:
        """Answer everyone who still waits."""
        for future in self.futures:
            if future.done():
                continue
            if isinstance(result, VecmillError):
                future.set_exception(result.again())
            elif isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def duplicate_key(model: str, row: Row) -> Hashable:
    """Equal for rows that give the same vector: of those in flight only one is run."""
    prefix = row.prefix.token_ids.tobytes() if row.prefix is not None else b""
    return model, row.token_ids.tobytes(), prefix, row.unpooled, row.second_text, row.adapter
