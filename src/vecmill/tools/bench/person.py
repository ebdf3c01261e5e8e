"""A person who searches: one short query after another, on a clock that waits for no answer."""

from __future__ import annotations

import asyncio
from time import perf_counter

from vecmill.tools.bench.bulk import Advance
from vecmill.tools.bench.client import Client
from vecmill.tools.bench.results import Outcomes, outcomes_of
from vecmill.tools.bench.workload import QUERIES

TIMER_S = 0.001  # how coarse an event loop's timers are; a fast answer takes hardly longer


async def search(client: Client, seconds: float, interval: float, advance: Advance = lambda texts: None) -> Outcomes:
    """A query every `interval` seconds, at least one. The latency counts from when a query was due.

    A query that is due is sent though earlier ones are unanswered, as other people's would be: a server that stalls
    for a second delays all the queries of that second, and all of them count.
    """
    bodies = [client.target.query_body(query) for query in QUERIES]
    began = perf_counter()
    asked = []
    async with asyncio.TaskGroup() as group:
        for number in range(max(1, round(seconds / interval))):
            due = began + number * interval
            await _until(due)
            asked.append(group.create_task(client.post(bodies[number % len(bodies)], due)))
            advance(1)
    return outcomes_of([task.result() for task in asked])


async def _until(moment: float) -> None:
    """Sleep to shortly before it, then look at the clock each time that the loop has nothing else to do."""
    await asyncio.sleep(max(0.0, moment - perf_counter() - TIMER_S))
    while perf_counter() < moment:  # noqa: ASYNC110  # there is no event to wait for but time
        await asyncio.sleep(0)
