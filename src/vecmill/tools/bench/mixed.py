"""A person's latency beside a bulk load, and what the person costs the bulk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from vecmill.tools.bench.bulk import Bulk
from vecmill.tools.bench.client import Client
from vecmill.tools.bench.event_loop import run
from vecmill.tools.bench.person import search
from vecmill.tools.bench.progress import Progress
from vecmill.tools.bench.results import Load, Outcomes
from vecmill.tools.bench.target import Target
from vecmill.tools.bench.warm_up import warm_up
from vecmill.tools.bench.workload import Payload, payloads

CONNECTIONS = 4
SECONDS = 10.0
QUERY_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class MixedResult:
    """Each alone, then both together."""

    dimensions: int | None
    """None: scores, not vectors."""
    query_interval: float
    """Seconds between the person's queries."""
    person_alone: Outcomes
    person_beside_bulk: Outcomes
    bulk_alone: Load
    bulk_beside_person: Load

    @property
    def bulk_loss_percent(self) -> float | None:
        """Of the bulk's texts per second, negative for a gain; None where none were answered alone."""
        alone, beside = self.bulk_alone.texts_per_second, self.bulk_beside_person.texts_per_second
        return 100 * (1 - beside / alone) if alone else None


def measure(
    target: Target,
    texts: Sequence[str],
    *,
    batch: int = 32,
    connections: int = CONNECTIONS,
    seconds: float = SECONDS,
    query_interval: float = QUERY_INTERVAL_S,
    warm_up_seconds: float = 1.0,
    progress: Progress | None = None,
) -> MixedResult:
    """Measure the person alone, the bulk alone and both together, each for so many seconds.

    The bulk begins with the same texts both times. It must not be called from a running event loop.

    Raises:
        BenchError: the server cannot be reached or does not answer as its dialect asks.
    """
    requests = payloads(target, texts, batch)
    shown = progress or Progress(shown=False)
    return run(_measure(target, requests, connections, seconds, query_interval, warm_up_seconds, shown))


async def _measure(
    target: Target,
    requests: list[Payload],
    connections: int,
    seconds: float,
    interval: float,
    warm_up_seconds: float,
    progress: Progress,
) -> MixedResult:
    # Apart, for a person is another program: a query never waits for one of the bulk's connections.
    async with Client(target, connections) as bulk_client, Client(target) as person_client:
        with progress.stage("warm-up", warm_up_seconds):
            dimensions = await warm_up(bulk_client, requests, connections, warm_up_seconds)
            await search(person_client, 2 * interval, interval)
        with progress.stage("the person alone", seconds):
            person_alone = await search(person_client, seconds, interval)
        with progress.stage("bulk alone", seconds) as advance:
            bulk_alone = await Bulk(bulk_client, cycle(requests), advance).run(connections, seconds)
        with progress.stage("both", seconds) as advance:
            bulk_beside, person_beside = await asyncio.gather(
                Bulk(bulk_client, cycle(requests), advance).run(connections, seconds),
                search(person_client, seconds, interval),
            )
    return MixedResult(dimensions, interval, person_alone, person_beside, bulk_alone, bulk_beside)
