"""Whether vecmill keeps its pace: 1 to 256 connections, 1 to 64 indexing jobs, 100 to 100,000 texts waiting.

Connections send one short text at a time. Jobs each send batches of code, one after another, for a fixed time; fairness
is the tokens of the job that got least over those of the job that got most, 1 being equal. Since every job's last
request counts whole, few requests per job make it look less fair than it is. The queue is measured in process: one cut
of a batch and its texts leaving their lines, with 1, 16 and 256 clients. A cut looks at every line, so with fewer texts
waiting than there are clients it has less to do; the growth is told from there and from where every client has a line.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --parts queue

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bundled import bundled_model
from benchmarks.contention import watched
from benchmarks.host import describe_host
from benchmarks.progress import progress
from benchmarks.results import publish
from benchmarks.rounds import print_disturbance, rounded, shown
from benchmarks.scaling_load import measure_connections, measure_jobs
from benchmarks.scaling_queue import measure as measure_queue
from benchmarks.servers import free_port, running, vecmill_command
from benchmarks.texts import sample_texts
from rich.console import Console
from rich.table import Table

PARTS = ("connections", "jobs", "queue")
SHORT = 80  # characters
# Of a job's texts. Short, so that each of many jobs has several requests answered in the time there is.
OF_JOB = 160


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
