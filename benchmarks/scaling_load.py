"""A server with more and more connections, and with more and more indexing jobs."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from benchmarks.model_rounds import spread
from benchmarks.rounds import in_turns

from vecmill.tools.bench.load_generator import Bulk, BulkLoad, Outcomes, TargetClient, run
from vecmill.tools.bench.scenarios import measure_sweep
from vecmill.tools.bench.target import BenchTarget
from vecmill.tools.bench.workload import payloads

WARM_UP_SECONDS = 0.5


@dataclass(frozen=True)
class OfJob(BenchTarget):
    """Requests that say which indexing job they belong to."""

    job: str = field(kw_only=True)

    @property
    def headers(self) -> dict[str, str]:
        """As of any request, and the job's."""
        return {**super().headers, "X-Job-ID": self.job}


def measure_connections(
    url: str, texts: Sequence[str], levels: Sequence[int], rounds: int, seconds: float, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Requests of one text, by connections; the texts must be more than there are connections."""
    found: dict[int, list[BulkLoad]] = {level: [] for level in levels}
    for level in in_turns(levels, rounds):
        sweep = measure_sweep(
            BenchTarget(url), texts, batch=1, levels=[level], seconds=seconds, warm_up_seconds=WARM_UP_SECONDS
        )
        found[level] += sweep.levels
        advance(1)
    fewest = found[min(levels)]
    return {str(level): _level(loads, fewest) for level, loads in found.items()}


def _level(loads: Sequence[BulkLoad], fewest: Sequence[BulkLoad]) -> dict[str, Any]:
    pairs = zip(loads, fewest, strict=True)
    latencies = [_answered(load.outcomes).latency_ms for load in loads]
    return {
        "texts_per_s": spread([load.texts_per_second for load in loads]),
        "over_fewest": spread([load.texts_per_second / alone.texts_per_second for load, alone in pairs]),
        "latency_ms": {
            name: spread([getattr(latency, name) for latency in latencies]) for name in ("p50", "p95", "p99", "max")
        },
        "client_cpu": spread([load.client_cpu for load in loads]),
    }


def _answered(outcomes: Outcomes) -> Outcomes:
    """RuntimeError where a request was refused or failed: a server that refuses does not scale."""
    if outcomes.errors or outcomes.latency_ms is None:
        raise RuntimeError(f"the server answered with errors, the first: {outcomes.first_error}")
    return outcomes


def measure_jobs(
    url: str,
    texts: Sequence[str],
    levels: Sequence[int],
    batch: int,
    rounds: int,
    seconds: float,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Jobs that each send batch after batch, by their number."""
    found: dict[int, list[list[BulkLoad]]] = {level: [] for level in levels}
    for level in in_turns(levels, rounds):
        found[level].append(run(_jobs(url, texts, level, batch, seconds)))
        advance(1)
    fewest = found[min(levels)]
    return {str(level): _of_jobs(each, fewest, batch) for level, each in found.items()}


async def _jobs(url: str, texts: Sequence[str], jobs: int, batch: int, seconds: float) -> list[BulkLoad]:
    async with AsyncExitStack() as stack:
        targets = [OfJob(url, job=f"benchmark-{number}") for number in range(jobs)]
        clients = [await stack.enter_async_context(TargetClient(target, 1)) for target in targets]
        # Its own texts for each job, for equal ones in flight are computed once; full batches, for the few texts of a
        # last one would be taken for a person's.
        each = len(texts) // jobs // batch * batch
        sources = [cycle(payloads(target, texts[number::jobs][:each], batch)) for number, target in enumerate(targets)]
        return await asyncio.gather(
            *(Bulk(client, source).run(1, seconds) for client, source in zip(clients, sources, strict=True))
        )


def _of_jobs(rounds: Sequence[Sequence[BulkLoad]], fewest: Sequence[Sequence[BulkLoad]], batch: int) -> dict[str, Any]:
    for loads in rounds:
        for load in loads:
            _answered(load.outcomes)
    rates = [_rate(loads) for loads in rounds]
    alone = [_rate(loads) for loads in fewest]
    return {
        "texts_per_s": spread(rates),
        "over_fewest": spread([rate / one for rate, one in zip(rates, alone, strict=True)]),
        "fairness_tokens": spread([_least_over_most([_tokens(load) for load in loads]) for loads in rounds]),
        "fairness_texts": spread([_least_over_most([load.texts for load in loads]) for loads in rounds]),
        "fewest_requests_of_a_job": min(load.texts for loads in rounds for load in loads) // batch,
    }


def _rate(loads: Sequence[BulkLoad]) -> float:
    return sum(load.texts for load in loads) / max(load.seconds for load in loads)


def _tokens(load: BulkLoad) -> float:
    if load.tokens_per_second is None:
        raise RuntimeError("the server does not say how many tokens it computed")
    return load.tokens_per_second * load.seconds


def _least_over_most(values: Sequence[float]) -> float:
    return min(values) / max(values)
