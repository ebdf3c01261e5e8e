"""Requests that are meant to hurt: how long the event loop is held by each, how much memory it takes, its answer.

A server in a process of its own, on the bundled MiniLM, is sent one request after another: token ids, a million
mistakes, a million inputs, one long word, JSON of every shape, heads, lines of batches, followers of jobs; each at
several sizes. Beside it another connection asks GET /health every 10 ms: the longest that it waits is how long the loop
was held. Memory is the highest that was resident during a request less what was before; what an earlier request has
taken and given back to the allocator alone counts as taken before. A server that takes more than --most-gb is killed.

    python -m benchmarks.serving.hostile
    python -m benchmarks.serving.hostile --sizes 1,33 --groups JSON,mistakes

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

from benchmarks.lib.figures import print_disturbance, rounded
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.results import keep_so_far, progress, publish
from benchmarks.lib.servers import RunningServer, free_port, running, vecmill_command
from benchmarks.serving.answer_memory import CLEAR_HIGHEST, megabytes
from benchmarks.serving.hostile_cases import HostileCase, cases
from rich.console import Console
from rich.table import Table

MOST_STALL_MS = 100.0
MOST_BODIES, MOST_BESIDE_MB = 8.0, 50.0
SERVE = ("--rerank-model", "none", "--torch-compile", "false")
PING_EVERY_S = 0.01
QUIET_S = 1.0
AFTER_S = 0.2
TINY_MB = [0.05]
MB = 1_000_000


@dataclass
class Pings:
    """The durations of GET /health in milliseconds."""

    milliseconds: list[float] = field(default_factory=list)
    killed: bool = False

    @property
    def longest(self) -> float:
        return max(self.milliseconds, default=0.0)


@contextmanager
def pinged(server: RunningServer, most_gb: float) -> Iterator[Pings]:
    """Send GET /health while the block runs; kill the server if it takes more than `most_gb`."""
    pings, over = Pings(), Event()

    threads = [
        Thread(target=_ping, args=(server.url, pings, over), name="ping"),
        Thread(target=_watch, args=(server.pid, most_gb, pings, over), name="watch"),
    ]
    for thread in threads:
        thread.start()
    try:
        yield pings
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _ping(url: str, pings: Pings, over: Event) -> None:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=300)
    while not over.wait(PING_EVERY_S):
        started = time.perf_counter()
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
        except (OSError, HTTPException):
            connection.close()
        pings.milliseconds.append(1000 * (time.perf_counter() - started))
    connection.close()


def _watch(pid: int, most_gb: float, pings: Pings, over: Event) -> None:
    while not over.wait(PING_EVERY_S):
        with suppress(OSError, AssertionError):  # it may have ended by itself
            if megabytes(pid, "VmRSS") > 1000 * most_gb:
                pings.killed = True
                os.kill(pid, signal.SIGKILL)
                return


def measured(server: RunningServer, case: HostileCase, size: int, most_gb: float) -> dict[str, Any]:
    """Send one attack; how long it held the event loop, how far memory rose, and the status of its answer."""
    attack = case.prepared(size)
    Path(f"/proc/{server.pid}/clear_refs").write_text(CLEAR_HIGHEST)
    before = megabytes(server.pid, "VmRSS")
    with pinged(server, most_gb) as pings:
        time.sleep(5 * PING_EVERY_S)
        started = time.perf_counter()
        status = attack(server.url)
        seconds = time.perf_counter() - started
        time.sleep(AFTER_S)
    grown = 0.0 if pings.killed else max(0.0, megabytes(server.pid, "VmHWM") - before)
    most_mb = MOST_BODIES * size / MB + MOST_BESIDE_MB
    return {
        "stall_ms": {
            "longest": round(pings.longest, 1),
            "target": MOST_STALL_MS,
            "met": pings.longest <= MOST_STALL_MS,
        },
        "memory_mb": {"grown": round(grown, 1), "target": most_mb, "met": not pings.killed and grown <= most_mb},
        "status": {"answer": status, "met": status == 200 or 400 <= status < 500},
        "seconds": round(seconds, 3),
        "killed": pings.killed,
    }


def measure(
    options: argparse.Namespace, chosen: Sequence[HostileCase], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Every case at every size, the small ones first; a server that was killed is started again."""
    work = [(case, size) for size in options.sizes for case in chosen]
    results: dict[str, Any] = {"quiet_ms": 0.0, "cases": {}}
    while work:
        port = free_port()
        with running(vecmill_command(port, *SERVE, *options.serve), port, "/ready") as server:
            with pinged(server, options.most_gb) as quiet:
                time.sleep(QUIET_S)
            results["quiet_ms"] = max(results["quiet_ms"], round(quiet.longest, 1))
            while work:
                case, size = work.pop(0)
                result = measured(server, case, round(size * MB), options.most_gb)
                results["cases"].setdefault(f"{case.group}: {case.name}", {})[f"{size:g} MB"] = result
                keep_so_far("hostile", results)
                advance(1)
                if result["killed"]:
                    break
    return results


def all_of(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of all cases at all sizes: how many there were, how many stayed within every target, the longest stall."""
    each = [result for sizes in cases.values() for result in sizes.values()]
    longest = max(result["stall_ms"]["longest"] for result in each)
    return {
        "attacks": len(each),
        "within_targets": sum(not _missed(result) for result in each),
        "stall_ms": {"longest": longest, "target": MOST_STALL_MS, "met": longest <= MOST_STALL_MS},
    }


def _missed(result: Mapping[str, Any]) -> list[str]:
    return [what for what in ("stall_ms", "memory_mb", "status") if not result[what]["met"]]


def print_summary(results: Mapping[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    table = Table(title="Requests that are meant to hurt", title_justify="left")
    for heading in ("case", "size", "loop held ms", "memory MB", "answer", "s", ""):
        left = heading in ("case", "")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for name, sizes in results["cases"].items():
        for size, result in sizes.items():
            misses = _missed(result)
            table.add_row(
                name,
                size,
                rounded(result["stall_ms"]["longest"]),
                "killed" if result["killed"] else rounded(result["memory_mb"]["grown"]),
                str(result["status"]["answer"] or "none"),
                rounded(result["seconds"]),
                f"MISSED: {', '.join(misses)}" if misses else "",
            )
    console.print(table)
    every = results["all"]
    console.print(
        f"{every['within_targets']} of {every['attacks']} within the targets: loop held at most {MOST_STALL_MS:g} ms, "
        f"memory at most {MOST_BODIES:g} times the request and {MOST_BESIDE_MB:g} MB, answered with 200 or 4xx; with "
        f"nothing else to do GET /health waits up to {rounded(results['quiet_ms'])} ms",
        soft_wrap=True,
    )
    print_disturbance(console, other_cores)


def sizes(value: str) -> list[float]:
    """The sizes in a comma-separated list."""
    return [float(number) for number in value.split(",")]


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=sizes, default=[1, 10, 33], help="of a request, in MB (default: 1,10,33)")
    parser.add_argument("--groups", type=lambda value: value.split(","), help="only these groups of cases")
    parser.add_argument("--tiny", action="store_true", help="every case at 50 kB: whether all of this works")
    parser.add_argument("--most-gb", type=float, default=6, help="of the server's memory (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    if options.tiny:
        options.sizes = TINY_MB
    chosen = [case for case in cases() if options.groups is None or case.group in options.groups]
    with watched() as contention, progress("requests", len(chosen) * len(options.sizes)) as advance:
        results = measure(options, chosen, advance)
    results["all"] = all_of(results["cases"])
    print_summary(results, contention.other_cores)
    settings = {"sizes_mb": options.sizes, "groups": options.groups, "serve": options.serve}
    about = {"host": describe_host(), "settings": settings, "other_cores": round(contention.other_cores, 3)}
    publish("hostile", {**about, **results}, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
