"""A server under load for as long as it takes to see whether it holds: 1,000 connections, 15 minutes, every dialect.

`vecmill serve` in a process of its own, on the bundled MiniLM, with keys and its cache. A thousand clients keep a
connection open each and send when it pleases them, in the dialects of OpenAI, Jina, NIM, Cohere, TEI, Ollama and
CodeCartographer, rerank among them; some leave in the middle of a body or of an answer. Beside them run indexing jobs
with progress, batches of files, three open event streams, the dashboard's and Prometheus' questions, and requests that
have to be refused. Before the load every text was embedded alone; every answer is compared with that.

Judged, and the exit status is 1 where one does not hold: no 5xx; no hang (an answer within 60 s, a job or batch within
300 s); no connection broken by the server; the statuses that were due; answers as they are alone, within the tolerance
of docs/models.md; resident memory, descriptors and threads flat (the slope over the time after the warm-up, with its
95 % confidence interval), descriptors at the end as before and no more threads than under load; the 99th percentile of
GET /health, where the probe itself was not late: on a busy machine it says nothing of the server.

Before a load of five minutes and more, what the server keeps up to a bound is filled: the jobs and requests that it
shows, and a small cache of vectors. What grows then is no cache that fills.

/health is asked by a process of its own every 50 ms, which also says how late it woke itself: that is what the machine
takes, since clients and server share it. How late the load generator's own loop was is told, too.

    python -m benchmarks.soak
    python -m benchmarks.soak --minutes 480
    python -m benchmarks.soak --minutes 1 --no-store
"""

import argparse
import asyncio
import math
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
from benchmarks.lib.figures import print_disturbance, rounded, significant
from benchmarks.lib.health_probe import EVERY_S, Probes, probed
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.results import publish
from benchmarks.lib.servers import RunningServer, free_port, running, vecmill_command
from benchmarks.soak.clients import Load, Tally
from benchmarks.soak.dialects import Comparison, Corpus, Tolerance
from benchmarks.soak.wire import Connection
from rich.console import Console

from vecmill.tools.bench.load_generator import run

KEYS = 8
SEED = 23
SAMPLE_EVERY_S = 1.0
REST_S = 5.0  # after the load, until descriptors and threads are counted again
MOST_HEALTH_MS = 50.0
MB = 1e6
# What is called flat. Over a few minutes noise alone has a slope of many MB/h: then the MB over the whole time count.
MOST_MB_PER_HOUR, MOST_MB = 20.0, 16.0
CACHE_BYTES = 8 * 2**20
FILLED_FROM_MINUTES = 5.0
JOBS_KEPT, VECTORS_KEPT = 1000, 8000  # at least what the server keeps of each
MOST_MB_UNFILLED = 64.0  # in a shorter run, which ends while pools and caches still fill
MOST_PROBE_LATE_MS = 10.0  # p99: where the probe itself waits longer for a core, /health is told and not judged
MOST_DESCRIPTORS, MOST_THREADS = 16.0, 4.0
MOST_RATE = 40.0  # where the machine is slower or busy: less, or all would only wait
SLOWEST = 5  # dialects that are told with their times
BLOCKS, T_975 = 20, 2.101  # Student's t of BLOCKS - 2 degrees of freedom


@dataclass
class Samples:
    """What the server's process had, once a second."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    """Resident."""
    descriptors: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def take(self, process: psutil.Process, since: float) -> None:
        """Another one."""
        with process.oneshot():
            self.megabytes.append(process.memory_info().rss / MB)
            self.threads.append(process.num_threads())
            times = process.cpu_times()
        self.descriptors.append(process.num_fds())
        self.cpu_seconds = times.user + times.system
        self.seconds.append(time.perf_counter() - since)


@contextmanager
def sampled(pid: int) -> Iterator[Samples]:
    """Sample the process while the block runs, in a thread of its own."""
    samples, ended, process, since = Samples(), Event(), psutil.Process(pid), time.perf_counter()

    def sample() -> None:
        with suppress(psutil.NoSuchProcess):  # a server that dies is seen by its clients
            while not ended.wait(SAMPLE_EVERY_S):
                samples.take(process, since)

    thread = Thread(target=sample, name="samples")
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def trend(seconds: Sequence[float], values: Sequence[float], after: float, until: float) -> dict[str, Any]:
    """The slope per hour of what came after the warm-up and before the load's end, with its 95 % confidence interval.

    A line through the means of 20 blocks of equal time: what one sample tells is nearly what the one before it told, so
    that an interval over the samples themselves would be far too narrow.
    """
    times, numbers = np.asarray(seconds, dtype=np.float64), np.asarray(values, dtype=np.float64)
    chosen = (times >= after) & (times <= until)
    times, numbers = times[chosen] / 3600, numbers[chosen]
    if len(times) < BLOCKS:
        raise SystemExit(f"{BLOCKS} seconds after the warm-up are the least; give more --minutes.")
    x, y = (np.array([block.mean() for block in np.array_split(each, BLOCKS)]) for each in (times, numbers))
    slope, error = _line(x, y)
    low, high = slope - T_975 * error, slope + T_975 * error
    return {
        "per_hour": significant(slope),
        "low": significant(low),
        "high": significant(high),
        "blocks": [significant(float(mean)) for mean in y],
        "hours": significant(float(times[-1] - times[0])),
    }


def _line(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The slope of least squares, and its standard error."""
    about = x - x.mean()
    slope = float((about * y).sum() / (about**2).sum())
    rest = y - y.mean() - slope * about
    return slope, math.sqrt(float((rest**2).sum()) / (len(x) - 2) / float((about**2).sum()))


def flat(of: Mapping[str, Any], most_per_hour: float, most: float) -> dict[str, Any]:
    """Whether the interval holds 0, or ends below the greater of so much an hour and so much in all."""
    bound = max(most_per_hour, most / of["hours"])
    return {**of, "target": significant(bound), "met": of["low"] <= 0 or of["high"] <= bound}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The usual ones, and the largest."""
    figures = np.percentile(np.asarray(values, dtype=np.float64), (50, 95, 99, 100))
    return {name: significant(float(value)) for name, value in zip(("p50", "p95", "p99", "max"), figures, strict=True)}


@contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[RunningServer, list[str], str]]:
    """The server, the keys of those who use it, and the one of whoever looks after it."""
    keys, admin = [secrets.token_urlsafe(24) for _ in range(KEYS)], secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text("".join(f"user{number}:{key}\n" for number, key in enumerate(keys)))
        environment = {"API_KEY_FILE": str(file), "ADMIN_API_KEY": admin, "CACHE_MAX_BYTES": str(CACHE_BYTES)}
        port = free_port()
        command = vecmill_command(port, "--rerank-model", "none", *options.serve)
        with running(command, port, "/ready", environment) as server:
            yield server, keys, admin


async def soak(options: argparse.Namespace, load: Load, corpus: Corpus, server: RunningServer) -> dict[str, Any]:
    """The load and what was seen of the server meanwhile."""
    process = psutil.Process(server.pid)
    before = {"descriptors": process.num_fds()}
    used, began = time.process_time(), time.perf_counter()
    times = process.cpu_times()
    with probed(server.url) as probes, sampled(server.pid) as samples:
        await load.run(options.connections, options.rate, 60 * options.minutes)
    took = time.perf_counter() - began
    client_cpu = (time.process_time() - used) / took
    await asyncio.sleep(REST_S)
    after = {"descriptors": process.num_fds(), "threads": process.num_threads()}
    await load.alone(corpus.kept)
    return {
        "seconds": significant(took),
        "cores": {
            "server": significant((samples.cpu_seconds - times.user - times.system) / took),
            "load_generator": significant(client_cpu),
        },
        **_requests(load.tally, took),
        "checks": checks(options, load.tally, samples, probes, {"before": before, "after": after}),
        "health_ms": percentiles(probes.milliseconds),
        "late_ms": {"probe": percentiles(probes.late_ms), "load_generator": percentiles(load.tally.lag_ms)},
    }


def _requests(tally: Tally, seconds: float) -> dict[str, Any]:
    return {
        "requests_per_second": significant(tally.statuses.total() / seconds),
        "latency_ms": percentiles([each for some in tally.milliseconds.values() for each in some]),
        "slowest_ms": {
            name: {"p50": rounded(float(np.median(some))), "max": rounded(max(some))}
            for name, some in sorted(tally.milliseconds.items(), key=lambda item: -max(item[1]))[:SLOWEST]
        },
        "answers": {name: len(some) for name, some in sorted(tally.milliseconds.items())},
        "statuses": dict(sorted(tally.statuses.items())),
        "left": dict(tally.left),
        "ended": dict(tally.ended),
        "problems": tally.told,
    }


def checks(
    options: argparse.Namespace, tally: Tally, samples: Samples, probes: Probes, rest: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Each promise: what was seen, and whether it holds."""
    comparison, problems = tally.comparison, tally.problems
    per_hour = {
        name: trend(samples.seconds, getattr(samples, name), options.warm_up, 60 * options.minutes)
        for name in ("megabytes", "descriptors", "threads")
    }
    none = {
        kind: {"count": problems[kind], "met": not problems[kind]} for kind in ("5xx", "hang", "broken", "unexpected")
    }
    health, quiet = percentiles(probes.milliseconds)["p99"], percentiles(probes.late_ms)["p99"] <= MOST_PROBE_LATE_MS
    # Pools start their threads when they are first needed.
    more_threads = rest["after"]["threads"] - per_hour["threads"]["blocks"][0]
    more_descriptors = rest["after"]["descriptors"] - rest["before"]["descriptors"]
    return {
        **none,
        "answers": {
            "vectors": comparison.vectors,
            "scores": comparison.scores,
            "wrong": comparison.wrong,
            "lowest_cosine": round(comparison.lowest_cosine, 7),
            "largest_value": float(f"{comparison.largest_value:.2g}"),
            "largest_score": float(f"{comparison.largest_score:.2g}"),
            "met": not comparison.wrong and not problems["wrong"] and comparison.vectors > 0,
        },
        "memory_mb": flat(
            per_hour["megabytes"],
            MOST_MB_PER_HOUR,
            MOST_MB if options.minutes >= FILLED_FROM_MINUTES else MOST_MB_UNFILLED,
        ),
        "descriptors": flat(per_hour["descriptors"], 0, MOST_DESCRIPTORS),
        "threads": flat(per_hour["threads"], 0, MOST_THREADS),
        "at_rest": {
            **rest,
            "met": more_descriptors <= MOST_DESCRIPTORS and more_threads <= MOST_THREADS,
        },
        "health_p99_ms": {
            "value": health,
            "target": options.most_health_ms,
            "judged": quiet,
            "met": health <= options.most_health_ms or not quiet,
        },
        "health": {"asked": len(probes.milliseconds), "failed": probes.failed, "met": not probes.failed},
    }


def print_summary(result: Mapping[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    cores, late, checks = result["cores"], result["late_ms"], result["checks"]
    console.print(
        f"{sum(result['statuses'].values()):,} answers in {result['seconds']:,.0f} s, {result['requests_per_second']} "
        f"a second, {_times(result['latency_ms'])}; slowest {result['slowest_ms']}; statuses {result['statuses']}; "
        f"{sum(result['left'].values())} clients left; {result['ended']}",
        soft_wrap=True,
    )
    for name, check in checks.items():
        told = ", ".join(f"{key} {_ends(value)}" for key, value in check.items() if key != "met")
        console.print(f"{'held  ' if check['met'] else 'MISSED'} {name}: {told}", soft_wrap=True)
    console.print(
        f"GET /health every {1000 * EVERY_S:.0f} ms: {_times(result['health_ms'])}; the probe itself woke late by p99 "
        f"{rounded(late['probe']['p99'])} ms, the load generator's loop by p99 "
        f"{rounded(late['load_generator']['p99'])} ms; cores: server {cores['server']}, load generator "
        f"{cores['load_generator']}",
        soft_wrap=True,
    )
    for problem in result["problems"]:
        console.print(problem, soft_wrap=True)
    print_disturbance(console, other_cores)


def _ends(value: Any) -> Any:
    """A series as its first and last value."""
    return f"{value[0]} to {value[-1]}" if isinstance(value, list) and value else value


def _times(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rounded(value)} ms" for name, value in figures.items())


def allow_connections(count: int) -> None:
    """Raise this process's limit of descriptors, which its children inherit, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 256
    if soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the server, ask for everything alone, load it."""
    corpus = Corpus(SEED)
    with served(options) as (server, keys, admin):
        headers = {"Authorization": f"Bearer {keys[0]}"}
        model = httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"][0]
        comparison = Comparison(Tolerance.of(model["dtype"]))

        async def everything() -> dict[str, Any]:
            one_by_one = await corpus.learn(Connection(server.url, keys[0]))
            options.rate = options.rate or significant(min(MOST_RATE, one_by_one / 3))
            load = Load(server.url, keys, admin, corpus, comparison)
            if options.minutes >= FILLED_FROM_MINUTES:
                await load.fill(JOBS_KEPT, VECTORS_KEPT)
            return await soak(options, load, corpus, server)

        return {"dtype": model["dtype"], "tolerance": vars(comparison.tolerance), **run(everything())}


def main() -> int:
    """Measure, print, store; 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="of load (default: %(default)s; 480 are 8 hours)")
    parser.add_argument("--connections", type=int, default=1000, help="open at a time (default: %(default)s)")
    parser.add_argument(
        "--rate",
        type=float,
        help=f"callers' requests a second (default: a third of what is answered one by one, at most {MOST_RATE:g})",
    )
    parser.add_argument("--warm-up", type=float, help="seconds before slopes count (default: a third, at most 300)")
    parser.add_argument("--most-health-ms", type=float, default=MOST_HEALTH_MS, help="(default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    options.warm_up = min(300, 20 * options.minutes) if options.warm_up is None else options.warm_up
    allow_connections(options.connections)
    with watched() as contention:
        result = measure(options)
    print_summary(result, contention.other_cores)
    names = ("minutes", "connections", "rate", "warm_up", "most_health_ms", "serve")
    settings = {name: getattr(options, name) for name in names}
    about = {"host": describe_host(), "settings": settings, "other_cores": round(contention.other_cores, 3)}
    publish("soak", {**about, **result}, store=not options.no_store)
    return 0 if all(check["met"] for check in result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
