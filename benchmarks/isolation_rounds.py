"""A person beside bulk on each server in turns; a server that fails is left out from then on, with its reason."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from benchmarks.contention import watched
from benchmarks.environments import Unavailable
from benchmarks.peers import PEERS, SERVED_NAME, Peer, Wanted
from benchmarks.rounds import in_turns
from benchmarks.servers import RunningServer

from vecmill.tools.bench.scenarios import MixedResult, measure_mixed
from vecmill.tools.bench.target import PATHS, BenchError, BenchTarget, Dialect

OURS = "vecmill"
DIALECTS = {PATHS[dialect]: dialect for dialect in (Dialect.OPENAI, Dialect.INFINITY, Dialect.TEI)}


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
        return BenchTarget(url, Dialect.OPENAI)
    dialect = DIALECTS[peer.dialect.path]
    return BenchTarget(url, dialect, None if dialect is Dialect.TEI else SERVED_NAME)


def _forward_ms(server: RunningServer) -> float:
    capabilities: dict[str, Any] = httpx.get(f"{server.url}/capabilities", timeout=10.0).json()
    (forward,) = capabilities["forward_passes"].values()
    return float(forward["max_batch_tokens_ms"])


def _pass(target: BenchTarget, plan: Plan, forward_ms: float | None) -> Pass:
    with watched() as contention:
        mixed = measure_mixed(target, plan.texts, batch=plan.batch, connections=plan.connections, seconds=plan.seconds)
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
