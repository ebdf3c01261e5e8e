"""Load on a server: bulk requests over connections, and a person's queries on a clock; what became of them, in numbers.

`vecmill bench` and the benchmarks measure servers with this.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np

from vecmill.tools.bench.target import (
    BadAnswer,
    BenchError,
    BenchTarget,
    Payload,
    cached_of,
    dimensions_of,
    tokens_of,
)
from vecmill.tools.bench.workload import Requests
from vecmill.tools.http_client import Answer, AsyncHttpClient, Patience

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

# One request is offered again only where the server says when: every other refusal is an error that counts.
PATIENCE = Patience(120.0, frozenset({429, 503}), only_when_told=True)
MANY_FAILURES = 100  # one after another: the server is gone, and asking on would only spin
TIMER_S = 0.001  # how coarse an event loop's timers are; a fast answer takes hardly longer
PERCENTILES = (50, 95, 99, 100)

Advance = Callable[[int], None]
"""Told how many more texts were answered."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Latency:
    """Of answered requests, in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of some requests."""

    requests: int
    latency_ms: Latency | None
    """None: no request was answered."""
    retries: dict[str, int]
    """Waits for Retry-After, by status. The latency counts them."""
    errors: dict[str, int]
    """By status, or by the name of what broke the connection."""
    first_error: str | None
    cached_share: float | None = None
    """Of the tokens, those whose vectors came from the server's cache, 0 to 1; None: the server does not say."""


@dataclass(frozen=True, slots=True)
class BulkLoad:
    """Bulk requests over some connections."""

    connections: int
    outcomes: Outcomes
    texts: int
    """Texts that were answered."""
    seconds: float
    """From the first request to the last answer: the rates are over these."""
    texts_per_second: float
    megabytes_per_second: float
    """Million bytes of UTF-8 text per second."""
    tokens_per_second: float | None
    """None: the server does not say how many tokens it computed."""
    client_cpu: float
    """The load generator's use of one core, 0 to 1 and, with its threads, a little over."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What one answer says of its tokens, as far as it does."""

    all: int | None
    cached: int | None

    @classmethod
    def read(cls, answer: Answer) -> TokenCounts:
        """Those of an answer whose content is still there."""
        return cls(tokens_of(answer.content, answer.headers), cached_of(answer.content, answer.headers))


class TargetClient(AsyncHttpClient):
    """Connections to the server that is measured."""

    def __init__(self, target: BenchTarget, connections: int | None = None) -> None:
        """`connections` None: as many as there are requests at once.

        Raises:
            UsageError: the address is not one, or the key cannot be sent.
        """
        super().__init__(target.endpoint, target.headers, PATIENCE, connections)
        self.target = target


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a measurement to its end, on the cheapest event loop there is: it shares the machine with the server.

    KeyboardInterrupt after Ctrl-C.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


class Bulk:
    """Connections that each send the next request when their last one is answered."""

    def __init__(
        self, client: TargetClient, payloads: Iterable[Payload], advance: Advance = lambda texts: None
    ) -> None:
        """`payloads` may be endless: `run` then needs a time. They are made one by one, as they are sent."""
        self._client = client
        self._payloads: Iterator[Payload] = iter(payloads)
        self._advance = advance
        self._answered: list[tuple[Payload, TokenCounts]] = []
        self._answers: list[Answer] = []
        """With those that are errors."""
        self._failures_in_a_row = 0

    async def run(self, connections: int, seconds: float | None = None) -> BulkLoad:
        """Send until the payloads end or `seconds` have passed; requests in progress are waited for."""
        began, cpu = perf_counter(), process_time()
        deadline = None if seconds is None else began + seconds
        await asyncio.gather(*(self._connection(deadline) for _ in range(connections)))
        took = max(perf_counter() - began, TIMER_S)
        return self._load(connections, took, (process_time() - cpu) / took)

    async def _connection(self, deadline: float | None) -> None:
        for payload in self._payloads:
            answer = await self._client.post(payload.body)
            self._answers.append(answer)
            if answer.error is None:
                self._failures_in_a_row = 0
                self._advance(payload.texts)
                counts = TokenCounts.read(answer)
                # Megabytes, of which nothing more is read.
                self._answered.append((replace(payload, body=b""), counts))
                answer.content = b""
            else:
                self._failures_in_a_row += 1
            if self._failures_in_a_row >= MANY_FAILURES or (deadline is not None and perf_counter() >= deadline):
                break

    def _load(self, connections: int, seconds: float, client_cpu: float) -> BulkLoad:
        texts = sum(payload.texts for payload, _ in self._answered)
        counts = [counts for _, counts in self._answered]
        tokens = _total([each.all for each in counts])
        return BulkLoad(
            connections=connections,
            outcomes=outcomes_of(self._answers, counts),
            texts=texts,
            seconds=seconds,
            texts_per_second=texts / seconds,
            megabytes_per_second=sum(payload.text_bytes for payload, _ in self._answered) / seconds / 1e6,
            tokens_per_second=None if tokens is None else tokens / seconds,
            client_cpu=client_cpu,
        )


def _total(counts: Sequence[int | None]) -> int | None:
    """Their sum; None where there are none, or one is not known."""
    known = [each for each in counts if each is not None]
    return sum(known) if known and len(known) == len(counts) else None


async def search(
    client: TargetClient, seconds: float, interval: float, bodies: Iterator[bytes] | None = None
) -> Outcomes:
    """A person who searches: a query every `interval` seconds, at least one; latency counts from when it was due.

    A query that is due is sent though earlier ones are unanswered, as other people's would be: a server that stalls
    for a second delays all the queries of that second, and all of them count. `bodies` None: queries that are all
    different.
    """
    bodies = Requests(client.target, ()).of_queries() if bodies is None else bodies
    began = perf_counter()
    queries = []
    async with asyncio.TaskGroup() as group:
        for number in range(max(1, round(seconds / interval))):
            due = began + number * interval
            await _until(due)
            queries.append(group.create_task(client.post(next(bodies), due)))
    answers = [query.result() for query in queries]
    return outcomes_of(answers, [TokenCounts.read(answer) for answer in answers if answer.error is None])


async def _until(moment: float) -> None:
    """Sleep to shortly before it, then look at the clock each time that the loop has nothing else to do."""
    await asyncio.sleep(max(0.0, moment - perf_counter() - TIMER_S))
    while perf_counter() < moment:  # noqa: ASYNC110  # there is no event to wait for but time
        await asyncio.sleep(0)


async def warm_up(client: TargetClient, payloads: Iterator[Payload], connections: int, seconds: float) -> int | None:
    """Check the first answer, then load the server for so many seconds; the size of its vectors, None for scores.

    Raises:
        BenchError: the server cannot be reached.
        BadAnswer: the first answer is an error or not one of the dialect.
    """
    [first] = islice(payloads, 1)
    answer = await client.post(first.body)
    endpoint = client.target.endpoint
    if answer.error is not None and not answer.error.isdigit():
        raise BenchError(f"{endpoint} cannot be reached: {answer.message}.")
    if answer.error is not None:
        raise BadAnswer(f"POST {endpoint} was answered with {answer.error}: {answer.message}")
    dimensions = dimensions_of(answer.content, client.target.dialect, first.texts)
    if seconds > 0:
        await Bulk(client, payloads).run(connections, seconds)
    return dimensions


def outcomes_of(answers: Sequence[Answer], counts: Sequence[TokenCounts] = ()) -> Outcomes:
    """Count the answers, and take the percentiles of those without an error, which `counts` are of."""
    retries: Counter[str] = Counter()
    for answer in answers:
        retries.update(answer.retries)
    failed = [answer for answer in answers if answer.error is not None]
    milliseconds = [answer.seconds * 1e3 for answer in answers if answer.error is None]
    return Outcomes(
        requests=len(answers),
        latency_ms=Latency(*np.percentile(milliseconds, PERCENTILES).tolist()) if milliseconds else None,
        retries=dict(retries),
        errors=dict(Counter(str(answer.error) for answer in failed)),
        first_error=f"{failed[0].error}: {failed[0].message}" if failed else None,
        cached_share=_cached_share(counts),
    )


def _cached_share(counts: Sequence[TokenCounts]) -> float | None:
    tokens, cached = _total([each.all for each in counts]), _total([each.cached for each in counts])
    return cached / tokens if tokens and cached is not None else None
