"""Whether vecmill keeps its pace: 1 to 256 connections, 1 to 64 indexing jobs, 100 to 100,000 texts waiting.

Connections send one short text at a time. Jobs each send batches of code, one after another, for a fixed time; fairness
is the tokens of the job that got least over those of the job that got most, 1 being equal. Since every job's last
request counts whole, few requests per job make it look less fair than it is. The queue is measured in process: one cut
of a batch and its texts leaving their lines, with 1, 16 and 256 clients. A cut looks at every line, so with fewer texts
waiting than there are clients it has less to do; the growth is told from there and from where every client has a line.

    python -m benchmarks.serving.scaling
    python -m benchmarks.serving.scaling --parts queue

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from benchmarks.lib.figures import in_turns, print_disturbance, rounded, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import bundled_model, sample_texts
from benchmarks.lib.results import progress, publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from benchmarks.serving.scaling_queue import measure as measure_queue
from rich.console import Console
from rich.table import Table

from vecmill.tools.bench.load_generator import Bulk, BulkLoad, Outcomes, TargetClient, run
from vecmill.tools.bench.scenarios import measure_sweep
from vecmill.tools.bench.target import BenchTarget
from vecmill.tools.bench.workload import payloads

WARM_UP_SECONDS = 0.5
PARTS = ("connections", "jobs", "queue")
SHORT = 80  # characters
# Of a job's texts. Short, so that each of many jobs has several requests answered in the time there is.
OF_JOB = 160


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
            BenchTarget(url),
            texts,
            batch=1,
            levels=[level],
            seconds=seconds,
            longest=SHORT,
            warm_up_seconds=WARM_UP_SECONDS,
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


def parts(value: str) -> list[str]:
    """Of a list with commas."""
    names = value.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return names


def numbers(value: str) -> list[int]:
    """Of a list with commas."""
    return [int(number) for number in value.split(",")]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that are wanted."""
    found: dict[str, Any] = {}
    if "queue" in options.parts:  # before the server takes a core
        steps = options.rounds * len(options.waiting) * len(options.clients)
        with progress("waiting texts", steps) as advance:
            found["queue"] = measure_queue(options.waiting, options.clients, options.rounds, options.cuts, advance)
    if {"connections", "jobs"} & set(options.parts):
        port = free_port()
        command = vecmill_command(port, "--embed-model", str(bundled_model()), "--rerank-model", "none", *options.serve)
        with running(command, port, "/ready") as server:
            found |= _over_http(server.url, options)
    return found


def _over_http(url: str, options: argparse.Namespace) -> dict[str, Any]:
    code = list(dict.fromkeys(sample_texts(options.texts)))
    found: dict[str, Any] = {}
    if "connections" in options.parts:
        short = list(dict.fromkeys(text[:SHORT] for text in code))
        with progress("connections", options.rounds * len(options.connections)) as advance:
            found["connections"] = measure_connections(
                url, short, options.connections, options.rounds, options.seconds, advance
            )
    if "jobs" in options.parts:
        with progress("jobs", options.rounds * len(options.jobs)) as advance:
            heads = list(dict.fromkeys(text[:OF_JOB] for text in code))
            found["jobs"] = measure_jobs(
                url, heads, options.jobs, options.batch, options.rounds, options.job_seconds, advance
            )
    return found


def print_summary(found: Mapping[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if connections := found.get("connections"):
        console.print(_table("connections, one short text per request", connections, _connection_cells))
    if jobs := found.get("jobs"):
        console.print(_table("jobs", jobs, _job_cells))
    for clients, queue in found.get("queue", {}).items():
        console.print(
            f"queue, {clients} clients: "
            + ", ".join(
                f"{int(depth):,} waiting {rounded(each['median'])} us per cut"
                for depth, each in queue["us_per_cut"].items()
            ),
            soft_wrap=True,
        )
        for what in ("most_over_fewest", "most_over_fewest_in_all_lines"):
            if growth := queue[what]:
                console.print(f"  {what.replace('_', ' ')}: {shown(growth)}", soft_wrap=True)
    print_disturbance(console, other_cores)


def _table(title: str, levels: Mapping[str, Any], cells: Any) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right")
    for heading in ("texts/s (min to max)", "over fewest"):
        table.add_column(heading, justify="right")
    first, *_ = levels.values()
    for heading in cells(first):
        table.add_column(heading, justify="right")
    for level, one in levels.items():
        table.add_row(level, shown(one["texts_per_s"]), shown(one["over_fewest"]), *cells(one).values())
    return table


def _connection_cells(one: Mapping[str, Any]) -> dict[str, str]:
    return {
        "p50 ms": shown(one["latency_ms"]["p50"]),
        "p99 ms": shown(one["latency_ms"]["p99"]),
        "client's core": f"{one['client_cpu']['median']:.0%}",
    }


def _job_cells(one: Mapping[str, Any]) -> dict[str, str]:
    return {
        "least / most tokens": shown(one["fairness_tokens"]),
        "least / most texts": shown(one["fairness_texts"]),
        "fewest requests of a job": str(one["fewest_requests_of_a_job"]),
    }


def enough_texts(options: argparse.Namespace) -> bool:
    """Whether equal texts are never in flight at a time, for those are computed once; a third may be equal heads."""
    return bool(options.texts > 1.5 * max(*options.connections, max(options.jobs) * options.batch))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=4000, help="different ones (default: %(default)s)")
    for name, default, what in (
        ("connections", [1, 4, 16, 64, 256], "at a time"),
        ("jobs", [1, 4, 16, 64], "at a time"),
        ("waiting", [100, 1_000, 10_000, 100_000], "texts in the queue"),
        ("clients", [1, 16, 256], "of the queue"),
    ):
        shown_default = ",".join(map(str, default))
        parser.add_argument(f"--{name}", type=numbers, default=default, help=f"{what} (default: {shown_default})")
    parser.add_argument("--seconds", type=float, default=5, help="at each number of connections (default: %(default)s)")
    # More than the few texts that vecmill takes for a person's search and puts before bulk.
    parser.add_argument("--batch", type=int, default=16, help="texts per request of a job (default: %(default)s)")
    parser.add_argument("--job-seconds", type=float, default=20, help="at each number of jobs (default: %(default)s)")
    parser.add_argument("--cuts", type=int, default=300, help="of each queue in a round (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args(arguments)
    if not enough_texts(options):
        parser.error("--texts is too small for so many connections or jobs")
    with watched() as contention:
        found = measure(options)
    print_summary(found, contention.other_cores)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    result = {"host": describe_host(), "settings": settings, **found, "other_cores": round(contention.other_cores, 3)}
    publish("scaling", result, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
