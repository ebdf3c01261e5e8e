"""Several servers under one port against the same servers, each asked at its own address.

Two servers, each for a card of its own, whose forward passes sleep, so that two cores are enough for both. Bulk, then
bulk beside a person's searches, by turns:

- `direct`: the client chooses the server of each request itself, by `core.routing`: no port before them
- `haproxy`: one port, of the configuration that `vecmill proxy-config` writes; the same servers
- `ray`: one port, of Ray Serve, with as many replicas that sleep as long (in an environment with the extra `ray`)

Two minutes, three with Ray:

    python -m benchmarks.cluster.one_port
    python -m benchmarks.cluster.one_port --ways direct,haproxy --rounds 1 --seconds 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cluster.proxy_overhead import proxied
from benchmarks.cluster.replicas import Measured, add_plan_arguments, forward_of, measure, plan_of, started
from benchmarks.cluster.simulated_server import PASS
from benchmarks.lib.figures import in_turns, print_disturbance, shown, spread
from benchmarks.lib.host import describe_host
from benchmarks.lib.results import keep_so_far, publish
from rich.console import Console
from rich.table import Table

from vecmill.tools.bench.load_generator import run
from vecmill.tools.bench.target import BenchTarget, TargetApi
from vecmill.tools.bench.workload import Requests

DIRECT = "direct"
WAYS = (DIRECT, "haproxy", "ray")
MOST_SLOWER = 5.0  # percent of the throughput, that one port may cost
BATCH_TOKENS = 4096  # of a pass, the same everywhere


@contextmanager
def behind_ray(replicas: int, fit: tuple[float, float]) -> Iterator[str]:
    """The address of Ray Serve with so many replicas whose passes sleep."""
    # Imported here: it gives this process one thread, and no model hub.
    from tests.cluster.ray_cluster import HOOK, ray_cluster

    settings = {
        "EMBED_MODEL": "all-MiniLM-L6-v2",
        "MAX_BATCH_TOKENS": str(BATCH_TOKENS),
        "TORCH_COMPILE": "false",
        "TOKENIZATION_WORKERS": "1",
        "CACHE_MAX_BYTES": "0",
        HOOK: "benchmarks.cluster.simulated_server.in_workers_of_ray",
        PASS: ",".join(map(str, fit)),
    }
    with TemporaryDirectory(prefix="v") as folder, ray_cluster(Path(folder), {"replicas": replicas}, settings) as ray:
        yield ray.url


def figures(rounds: Sequence[Measured], direct: Sequence[Measured]) -> dict[str, Any]:
    """Of one way, and what it costs against the servers' own addresses in the same round."""
    slower = [
        100 * (1 - each.texts_per_second / own.texts_per_second) for each, own in zip(rounds, direct, strict=True)
    ]
    return {
        "texts_per_s": spread([each.texts_per_second for each in rounds]),
        "texts_per_s_beside_person": spread([each.beside_texts_per_second for each in rounds]),
        "slower_percent": spread(slower),
        "person_beside_bulk_ms": {
            name: spread([each.person_ms[name] for each in rounds]) for name in ("p50", "p95", "p99")
        },
        "errors": sum(each.errors for each in rounds),
        "other_cores": spread([each.other_cores for each in rounds]),
    }


def print_summary(ways: Mapping[str, dict[str, Any]]) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    table = Table(title="one port before the servers, against each at its own", title_justify="left")
    for heading in ("way", "texts/s", "% slower", "beside a person", "person p50, p95, p99 ms", "errors"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, found in ways.items():
        person = found["person_beside_bulk_ms"]
        table.add_row(
            way,
            shown(found["texts_per_s"]),
            shown(found["slower_percent"]),
            shown(found["texts_per_s_beside_person"]),
            ", ".join(f"{person[name]['median']:.3g}" for name in person),
            str(found["errors"]),
        )
    console.print(table)
    print_disturbance(console, max(found["other_cores"]["max"] for found in ways.values()))
    for way in ways.keys() - {DIRECT}:
        slower = ways[way]["slower_percent"]["median"]
        met = "met" if slower <= MOST_SLOWER else "MISSED"
        console.print(f"{way}: {slower:.1f} % slower, target at most {MOST_SLOWER:g} %: {met}")


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help="with `direct`, the default: %(default)s")
    parser.add_argument("--servers", type=int, default=2, help="default: %(default)s")
    add_plan_arguments(parser, seconds=3, rounds=3)
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args()
    fit = (options.fixed_ms, options.us_per_token)
    plan = plan_of(options)
    wanted = [DIRECT, *(way for way in options.ways.split(",") if way != DIRECT)]
    found: dict[str, list[Measured]] = {way: [] for way in wanted}
    with ExitStack() as stack:
        urls = stack.enter_context(
            started("simulated", options.servers, ["--max-batch-tokens", str(BATCH_TOKENS)], fit)
        )
        asked = {DIRECT: urls}
        if "haproxy" in wanted:
            asked["haproxy"] = [stack.enter_context(proxied("haproxy", urls))]
        if "ray" in wanted:
            asked["ray"] = [stack.enter_context(behind_ray(options.servers, fit))]
        requests = Requests(BenchTarget(urls[0], TargetApi.OPENAI), plan.texts, plan.batch)
        forward = {way: forward_of(of_way[0]) for way, of_way in asked.items()}
        for way in in_turns(wanted, plan.rounds):
            print(way, file=sys.stderr, flush=True)
            connections = plan.connections * options.servers // len(asked[way])
            measured = run(measure(asked[way], "policy", replace(plan, connections=connections), requests))
            found[way].append(measured)
            keep_so_far("one_port", {way: len(rounds) for way, rounds in found.items()})
    ways = {way: figures(rounds, found[DIRECT]) for way, rounds in found.items()}
    print_summary(ways)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    result = {"host": describe_host(), "settings": settings, "forward_pass": forward, "ways": ways}
    publish("one_port", result, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
