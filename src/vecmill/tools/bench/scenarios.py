"""What is measured: a server under rising load, and a person's latency beside a bulk load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from vecmill.tools.bench.load_generator import Bulk, BulkLoad, Outcomes, TargetClient, run, search, warm_up
from vecmill.tools.bench.progress import StageBars
from vecmill.tools.bench.target import BenchTarget
from vecmill.tools.bench.workload import Requests

CONNECTIONS = 4  # of the bulk beside a person
SECONDS = 10.0
QUERY_INTERVAL_S = 0.1
WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A server under rising load."""

    dimensions: int | None
    """None: scores, not vectors."""
    levels: list[BulkLoad]


@dataclass(frozen=True, slots=True)
class MixedResult:
    """A person and a bulk load, each alone, then both together."""

    dimensions: int | None
    """None: scores, not vectors."""
    query_interval: float
    """Seconds between the person's queries."""
    person_alone: Outcomes
    person_beside_bulk: Outcomes
    bulk_alone: BulkLoad
    bulk_beside_person: BulkLoad

    @property
    def bulk_loss_percent(self) -> float | None:
        """What the bulk loses of its texts per second; negative: a gain; None where none were answered alone."""
        alone, beside = self.bulk_alone.texts_per_second, self.bulk_beside_person.texts_per_second
        return 100 * (1 - beside / alone) if alone else None


def level_name(connections: int) -> str:
    """The name of a sweep's level in the output."""
    return f"{connections} connection{'s' if connections > 1 else ''}"


def measure_sweep(
    target: BenchTarget,
    texts: Sequence[str],
    *,
    batch: int,
    levels: Sequence[int],
    seconds: float | None,
    longest: int | None = None,
    repeat: bool = False,
    warm_up_seconds: float = WARM_UP_S,
    progress: StageBars | None = None,
) -> SweepResult:
    """Load the server at each level (a number of connections) for so many seconds, or None: with as many texts.

    A text that was sent is changed before it is sent again, within `longest` characters; with `repeat` it is not. It
    must not be called from a running event loop.

    Raises:
        UsageError: the target's address is not one.
        BenchError: the server cannot be reached or does not answer as its dialect asks.
    """
    requests = Requests(target, texts, batch, longest=longest, repeat=repeat)
    texts_per_level = len(texts) if seconds is None else None
    shown = progress or StageBars(shown=False)
    return run(_sweep(target, requests, levels, texts_per_level, seconds, warm_up_seconds, shown))


async def _sweep(
    target: BenchTarget,
    requests: Requests,
    levels: Sequence[int],
    texts: int | None,
    seconds: float | None,
    warm_up_seconds: float,
    progress: StageBars,
) -> SweepResult:
    most = max(levels)
    async with TargetClient(target, most) as client:
        with progress.stage("warm-up", warm_up_seconds):
            dimensions = await warm_up(client, requests.of_texts(), most, warm_up_seconds)
        loads = []
        for connections in levels:
            with progress.stage(level_name(connections), seconds, texts or 0) as advance:
                loads.append(await Bulk(client, requests.of_texts(texts), advance).run(connections, seconds))
    return SweepResult(dimensions, loads)


def measure_mixed(
    target: BenchTarget,
    texts: Sequence[str],
    *,
    batch: int = 32,
    connections: int = CONNECTIONS,
    seconds: float = SECONDS,
    query_interval: float = QUERY_INTERVAL_S,
    longest: int | None = None,
    repeat: bool = False,
    warm_up_seconds: float = WARM_UP_S,
    progress: StageBars | None = None,
) -> MixedResult:
    """Measure the person alone, the bulk alone and both together, each for so many seconds.

    The bulk begins with the same texts both times, the second time with a number before each; with `repeat` as they
    are. No query is sent twice, unless the target may answer from a cache. It must not be called from a running event
    loop.

    Raises:
        UsageError: the target's address is not one.
        BenchError: the server cannot be reached or does not answer as its dialect asks.
    """
    requests = Requests(target, texts, batch, longest=longest, repeat=repeat)
    shown = progress or StageBars(shown=False)
    return run(_mixed(target, requests, connections, seconds, query_interval, warm_up_seconds, shown))


async def _mixed(
    target: BenchTarget,
    requests: Requests,
    connections: int,
    seconds: float,
    interval: float,
    warm_up_seconds: float,
    progress: StageBars,
) -> MixedResult:
    queries = requests.of_queries()
    # Apart, for a person is another program: a query never waits for one of the bulk's connections.
    async with TargetClient(target, connections) as bulk_client, TargetClient(target) as person_client:
        with progress.stage("warm-up", warm_up_seconds):
            dimensions = await warm_up(bulk_client, requests.of_texts(), connections, warm_up_seconds)
            await search(person_client, 2 * interval, interval, queries)
        with progress.stage("the person alone", seconds):
            person_alone = await search(person_client, seconds, interval, queries)
        with progress.stage("bulk alone", seconds) as advance:
            bulk_alone = await Bulk(bulk_client, requests.of_texts(), advance).run(connections, seconds)
        with progress.stage("both", seconds) as advance:
            bulk_beside, person_beside = await asyncio.gather(
                Bulk(bulk_client, requests.of_texts(), advance).run(connections, seconds),
                search(person_client, seconds, interval, queries),
            )
    return MixedResult(dimensions, interval, person_alone, person_beside, bulk_alone, bulk_beside)
