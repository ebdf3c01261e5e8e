"""Bulk requests, one after another on each of several connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter, process_time

from vecmill.tools.bench.client import Answer, Client
from vecmill.tools.bench.results import Load, outcomes_of
from vecmill.tools.bench.workload import Payload

MANY_FAILURES = 100  # one after another: the server is gone, and asking on would only spin

Advance = Callable[[int], None]
"""Told how many more texts were answered."""


class Bulk:
    """Connections that each send the next request when their last one is answered."""

    def __init__(self, client: Client, payloads: Iterable[Payload], advance: Advance = lambda texts: None) -> None:
        """It ends with the payloads, which may be endless, or with the time given to `run`."""
        self._client = client
        self._payloads: Iterator[Payload] = iter(payloads)
        self._advance = advance
        self._done: list[tuple[Payload, Answer]] = []
        self._failures_in_a_row = 0

    async def run(self, connections: int, seconds: float | None = None) -> Load:
        """Send until the payloads end or, after so many seconds, no new ones are to be sent."""
        began, cpu = perf_counter(), process_time()
        deadline = None if seconds is None else began + seconds
        await asyncio.gather(*(self._connection(deadline) for _ in range(connections)))
        took = perf_counter() - began
        return _load(self._done, connections, took, (process_time() - cpu) / took)

    async def _connection(self, deadline: float | None) -> None:
        for payload in self._payloads:
            answer = await self._client.post(payload.body)
            self._done.append((payload, answer))
            if answer.error is None:
                self._failures_in_a_row = 0
                self._advance(payload.texts)
                answer.content = b""  # megabytes, of which nothing more is read
            else:
                self._failures_in_a_row += 1
            if self._failures_in_a_row >= MANY_FAILURES or (deadline is not None and perf_counter() >= deadline):
                break


def _load(done: Sequence[tuple[Payload, Answer]], connections: int, seconds: float, client_cpu: float) -> Load:
    answered = [(payload, answer) for payload, answer in done if answer.error is None]
    texts = sum(payload.texts for payload, _ in answered)
    tokens = [answer.tokens for _, answer in answered if answer.tokens is not None]
    return Load(
        connections=connections,
        outcomes=outcomes_of([answer for _, answer in done]),
        texts=texts,
        seconds=seconds,
        texts_per_second=texts / seconds,
        megabytes_per_second=sum(payload.text_bytes for payload, _ in answered) / seconds / 1e6,
        tokens_per_second=sum(tokens) / seconds if tokens and len(tokens) == len(answered) else None,
        client_cpu=client_cpu,
    )
