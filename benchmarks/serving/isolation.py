"""A person who searches while bulk runs: the query's latency against alone, and what the search costs bulk.

A query every 100 ms beside connections that each send batches of code, one after another; before that, each alone on
the same server. Servers are measured in turns, each round on a fresh start. Bulk's loss is about as large as the noise
of a machine, so it is taken several times, always from the neighbouring stretch without the person.

    python -m benchmarks.serving.isolation
    python -m benchmarks.serving.isolation --servers vecmill,reference --seconds 5

Ends with status 1 where vecmill was not measured; a target that is missed is only told.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks.lib.figures import in_turns, judged, print_disturbance, rounded, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import MAX_TOKENS, sample_texts
from benchmarks.lib.results import publish
from benchmarks.lib.servers import RunningServer
from benchmarks.serving.environments import Unavailable
from benchmarks.serving.peers import PEERS, SERVED_NAME, Peer, Wanted, add_server_options, wanted
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from vecmill.tools.bench.load_generator import Outcomes
from vecmill.tools.bench.scenarios import MixedResult, measure_mixed
from vecmill.tools.bench.target import BenchError, BenchTarget, TargetApi

OURS = "vecmill"
PERCENTILES = ("p50", "p95", "p99")
MOST_P95_MS = 150.0
MOST_FORWARDS = 3.0
MOST_LOSS_PERCENT = 10.0


@dataclass(frozen=True)
class Plan:
    """What is sent, and how often."""

    texts: Sequence[str]
    batch: int
    connections: int
    seconds: float
    """Of the person alone, of bulk alone, and of both."""
    rounds: int
    passes: int
    """In each round, on one start of a server."""


@dataclass(frozen=True)
class Pass:
    """The person alone, bulk alone, and both."""

    mixed: MixedResult
    forward_ms: float | None
    """A full forward pass of bulk; None where the server does not say."""
    other_cores: float
    """That programs outside the benchmark used meanwhile."""


@dataclass
class Found:
    """The passes of each server in their order, and why others have none or too few."""

    passes: dict[str, list[Pass]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    about: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Version and options of the servers that others wrote."""


def measure_rounds(names: Sequence[str], wanted: Wanted, plan: Plan) -> Found:
    """Every server in each round, each started anew."""
    found = Found()
    peers = {name: peer for name in names if (peer := _peer(name, wanted, found)) is not None}
    found.about = {name: peer.about for name, peer in peers.items() if peer.about}
    for number, name in enumerate(in_turns(list(peers), plan.rounds)):
        if name in found.failed:
            continue
        print(f"round {number // len(peers) + 1}/{plan.rounds}, {name}", file=sys.stderr, flush=True)
        try:
            found.passes.setdefault(name, []).extend(_round(name, peers[name], plan))
        except (RuntimeError, OSError, httpx.HTTPError, BenchError) as error:
            _fail(name, error, found)
    return found


def _peer(name: str, wanted: Wanted, found: Found) -> Peer | None:
    try:
        return PEERS[name](wanted)
    except Unavailable as error:
        _fail(name, error, found)
        return None


def _fail(name: str, error: Exception, found: Found) -> None:
    found.failed[name] = f"{type(error).__name__}: {error}"
    print(f"{name}: {error}", file=sys.stderr, flush=True)


def _round(name: str, peer: Peer, plan: Plan) -> list[Pass]:
    with peer.started() as server:
        forward_ms = _forward_ms(server) if name == OURS else None
        target = _target(name, peer, server.url)
        return [_pass(target, plan, forward_ms) for _ in range(plan.passes)]


def _target(name: str, peer: Peer, url: str) -> BenchTarget:
    """In the dialect whose answers cost least to write; the hand-written server has only lists of digits."""
    if name == OURS:
        return BenchTarget(url, TargetApi.OPENAI)
    dialect = peer.dialect.kind
    return BenchTarget(url, dialect, None if dialect is TargetApi.TEI else SERVED_NAME)


def _forward_ms(server: RunningServer) -> float:
    capabilities: dict[str, Any] = httpx.get(f"{server.url}/capabilities", timeout=10.0).json()
    (forward,) = capabilities["forward_passes"].values()
    return float(forward["max_batch_tokens_ms"])


def _pass(target: BenchTarget, plan: Plan, forward_ms: float | None) -> Pass:
    with watched() as contention:
        # No server has a cache here. The texts stay as they are: a number before them would make some too long.
        mixed = measure_mixed(
            target, plan.texts, batch=plan.batch, connections=plan.connections, seconds=plan.seconds, repeat=True
        )
    outcomes = (
        mixed.person_alone,
        mixed.person_beside_bulk,
        mixed.bulk_alone.outcomes,
        mixed.bulk_beside_person.outcomes,
    )
    # A server that refuses is not a faster one.
    if failed := [one.first_error for one in outcomes if one.errors]:
        raise RuntimeError(f"{target.endpoint} answered with errors, the first: {failed[0]}")
    return Pass(mixed, forward_ms, contention.other_cores)


def cut_texts(model_folder: Path, count: int) -> list[str]:
    """Different functions and classes, cut at the model's limit: not every server cuts, and all are to do the same."""
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    texts = sample_texts(count)
    ends = [max(end for _, end in encoding.offsets) for encoding in tokenizer.encode_batch(texts)]
    return list(dict.fromkeys(text[:end] for text, end in zip(texts, ends, strict=True)))


def summarise(found: Found) -> dict[str, Any]:
    """What JSON gets."""
    sides = {name: _side(name, passes) for name, passes in found.passes.items() if passes}
    return {"sides": sides, "ratios": _ratios(found), "about": found.about, "failed": dict(found.failed)}


def _side(name: str, passes: Sequence[Pass]) -> dict[str, Any]:
    alone, beside = _latencies(passes, _alone), _latencies(passes, _beside)
    loss = spread([one.mixed.bulk_loss_percent or 0.0 for one in passes])
    side: dict[str, Any] = {
        "person_alone_ms": alone,
        "person_beside_bulk_ms": beside,
        "slower_by": spread([_p95(_beside(one)) / _p95(_alone(one)) for one in passes]),
        "bulk_alone_texts_per_s": spread([one.mixed.bulk_alone.texts_per_second for one in passes]),
        "bulk_beside_person_texts_per_s": spread([one.mixed.bulk_beside_person.texts_per_second for one in passes]),
        "bulk_loss_percent": loss,
        "longest_ms": max(latency.max for one in passes if (latency := _beside(one).latency_ms)),
        "other_cores": spread([one.other_cores for one in passes]),
    }
    if name == OURS:
        beside["p95"] = judged(beside["p95"], MOST_P95_MS)
        side["bulk_loss_percent"] = judged(loss, MOST_LOSS_PERCENT)
        forwards = [_p95(_beside(one)) / one.forward_ms for one in passes if one.forward_ms]
        side["bulk_forward_ms"] = spread([one.forward_ms or 0.0 for one in passes])
        side["p95_in_bulk_forwards"] = judged(spread(forwards), MOST_FORWARDS)
    return side


def _alone(one: Pass) -> Outcomes:
    return one.mixed.person_alone


def _beside(one: Pass) -> Outcomes:
    return one.mixed.person_beside_bulk


def _p95(outcomes: Outcomes) -> float:
    return outcomes.latency_ms.p95 if outcomes.latency_ms else float("nan")


def _latencies(passes: Sequence[Pass], which: Callable[[Pass], Outcomes]) -> dict[str, dict[str, Any]]:
    return {name: spread([getattr(which(one).latency_ms, name) for one in passes]) for name in PERCENTILES}


def _ratios(found: Found) -> dict[str, dict[str, Any]]:
    """How much longer a person waits at the 95th percentile, and how much less bulk is done, than with vecmill."""
    ours = found.passes.get(OURS, [])
    pairs = {
        name: list(zip(ours, passes, strict=False))
        for name, passes in found.passes.items()
        if ours and passes and name != OURS
    }
    return {
        name: {
            "p95_beside_bulk": spread([_p95(_beside(their)) / _p95(_beside(our)) for our, their in both]),
            "bulk_beside_person": spread(
                [
                    our.mixed.bulk_beside_person.texts_per_second / their.mixed.bulk_beside_person.texts_per_second
                    for our, their in both
                ]
            ),
        }
        for name, both in pairs.items()
    }


def print_summary(found: Mapping[str, Any], plan: Plan) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 190)
    title = f"A query every 100 ms beside {plan.connections} connections with batches of {plan.batch}"
    table = Table(title=title, title_justify="left")
    table.add_column("server", no_wrap=True)
    for heading in ("alone p50/p95/p99 ms", "beside bulk p50/p95/p99 ms", "p95 min to max", "slower by"):
        table.add_column(heading, justify="right")
    for heading in ("bulk texts/s", "bulk loses %", "p95 / vecmill's", "vecmill's bulk / its"):
        table.add_column(heading, justify="right")
    for name, side in found["sides"].items():
        beside, ratios = side["person_beside_bulk_ms"], found["ratios"].get(name, {})
        table.add_row(
            name,
            _percentiles(side["person_alone_ms"]),
            _percentiles(beside),
            f"{rounded(beside['p95']['min'])} to {rounded(beside['p95']['max'])}",
            shown(side["slower_by"]),
            shown(side["bulk_alone_texts_per_s"]),
            shown({key: side["bulk_loss_percent"][key] for key in ("min", "median", "max")}),
            *(shown(ratios[key]) if ratios else "" for key in ("p95_beside_bulk", "bulk_beside_person")),
        )
    console.print(table)
    if ours := found["sides"].get(OURS):
        print_targets(console, ours)
    for name, reason in found["failed"].items():
        console.print(f"{name} failed: {reason.splitlines()[-1]}", markup=False, soft_wrap=True)
    print_remarks(console, found["sides"])


def _percentiles(latencies: Mapping[str, Any]) -> str:
    return " / ".join(rounded(latencies[name]["median"]) for name in PERCENTILES)


def print_targets(console: Console, ours: Mapping[str, Any]) -> None:
    """What is asked of vecmill on 2 cores."""
    for what, figure, unit in (
        ("the person's p95 beside bulk", ours["person_beside_bulk_ms"]["p95"], " ms"),
        ("the same in forward passes of bulk", ours["p95_in_bulk_forwards"], ""),
        ("bulk loses beside the person", ours["bulk_loss_percent"], " %"),
    ):
        console.print(f"{what}: {shown(figure, unit)}", soft_wrap=True)
    console.print(f"a forward pass of bulk takes {shown(ours['bulk_forward_ms'], ' ms')} by GET /capabilities")


def print_remarks(console: Console, sides: Mapping[str, Any]) -> None:
    """What may make the figures wrong."""
    print_disturbance(console, max((side["other_cores"]["max"] for side in sides.values()), default=0.0))


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1024, help="of bulk (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="texts per request (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=4, help="of bulk (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of each stretch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--passes", type=int, default=2, help="in each round (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    add_server_options(parser)
    options = parser.parse_args()
    started_with = wanted(options)
    texts = cut_texts(started_with.model_folder, options.texts)
    if len(texts) < (options.connections + 1) * options.batch:
        parser.error("--texts is too small: equal texts would be in flight at a time, and those are computed once")
    plan = Plan(texts, options.batch, options.connections, options.seconds, options.rounds, options.passes)
    found = summarise(measure_rounds(options.servers, started_with, plan))
    print_summary(found, plan)
    settings = {key: getattr(options, key) for key in ("servers", "batch", "connections", "seconds", "rounds")}
    about = {"texts": len(texts), "passes": options.passes, "query_interval_s": 0.1, "serve": options.serve, **settings}
    publish("isolation", {"host": describe_host(), "settings": about, **found}, store=not options.no_store)
    return 0 if OURS in found["sides"] else 1


if __name__ == "__main__":
    sys.exit(main())
