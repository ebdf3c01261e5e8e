"""One load after another, each with more connections: the points of the latency/throughput plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

from vecmill.tools.bench.bulk import Bulk
from vecmill.tools.bench.client import Client
from vecmill.tools.bench.event_loop import run
from vecmill.tools.bench.progress import Progress
from vecmill.tools.bench.results import Load
from vecmill.tools.bench.target import Target
from vecmill.tools.bench.warm_up import warm_up
from vecmill.tools.bench.workload import Payload, payloads


@dataclass(frozen=True, slots=True)
class Sweep:
    """A server under rising load."""

    dimensions: int | None
    """None: scores, not vectors."""
    levels: list[Load]


def level_name(connections: int) -> str:
    """A level as people call it."""
    return f"{connections} connection{'s' if connections > 1 else ''}"


def measure(
    target: Target,
    texts: Sequence[str],
    *,
    batch: int,
    levels: Sequence[int],
    seconds: float | None,
    warm_up_seconds: float = 1.0,
    progress: Progress | None = None,
) -> Sweep:
    """Load the server at each level (a number of connections) for so many seconds, or None: with each text once.

    Raises:
        BenchError: the server cannot be reached or does not answer as its dialect asks.
    """
    requests = payloads(target, texts, batch)
    return run(_measure(target, requests, levels, seconds, warm_up_seconds, progress or Progress(shown=False)))


async def _measure(
    target: Target,
    requests: list[Payload],
    levels: Sequence[int],
    seconds: float | None,
    warm_up_seconds: float,
    progress: Progress,
) -> Sweep:
    most = max(levels)
    async with Client(target, most) as client:
        with progress.stage("warm-up", warm_up_seconds):
            dimensions = await warm_up(client, requests, most, warm_up_seconds)
        loads = []
        for connections in levels:
            texts = sum(payload.texts for payload in requests)
            with progress.stage(level_name(connections), seconds, texts) as advance:
                source: Iterable[Payload] = requests if seconds is None else cycle(requests)
                loads.append(await Bulk(client, source, advance).run(connections, seconds))
    return Sweep(dimensions, loads)
