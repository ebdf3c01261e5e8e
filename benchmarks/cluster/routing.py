"""What a way of choosing replicas is worth: ours, power of two choices, round robin, and each half of ours alone.

A seeded simulation in virtual time; the choice itself is the code that serves (`vecmill.core.routing`). Each replica
takes `fixed + per_token * tokens` seconds for a forward pass, lets searches overtake bulk that waits, and keeps vectors
of its own. Indexers send a corpus twice, with some chunks inserted at its front the second time, while people search.
Every way gets the same requests; how full a replica is, is known as the front knows it: by what it has sent.

    python -m benchmarks.cluster.routing
    python -m benchmarks.cluster.routing --chunks 640 --store
"""

import argparse
import heapq
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from time import process_time
from typing import Any

import numpy as np
from benchmarks.lib.host import describe_host
from benchmarks.lib.results import publish
from rich.console import Console
from rich.table import Table

from vecmill.core.routing import (
    Policy,
    Replica,
    RoutedRequest,
    affinity_key,
    choose,
    expected_wait,
    owner,
    sampled,
    shortest_wait,
)
from vecmill.core.types import Lane

TEXT_TOKENS, SEARCH_TOKENS = 128, 16
TEXTS_PER_REQUEST = 64
AHEAD = 4  # requests that an indexer has in flight
RUNS = 2  # of each index
FREE_TOKENS = 512  # of bulk, that ride along with searches
# What is compared: replicas, how many of them are cards that take three times as long, and indexers.
SITUATIONS = {"equal cards": (4, 0, 6), "one slower card": (4, 1, 6), "few indexers": (8, 0, 3)}
INSERTED = 3  # chunks at the front of the second


@dataclass(eq=False)
class Request:
    """One that waits, runs or is done."""

    work: RoutedRequest
    texts: Sequence[str]
    sent: float
    left: int = 0
    """Tokens that are still to be computed."""
    done: Callable[[float], None] = lambda now: None


@dataclass(eq=False)
class SimulatedReplica:
    """One device with its queue and its cache."""

    known: Replica
    cached: int
    """Texts that its cache holds."""
    cache: OrderedDict[str, None] = field(default_factory=OrderedDict)
    waiting: dict[Lane, deque[Request]] = field(default_factory=lambda: {lane: deque() for lane in Lane})
    running: list[tuple[Request, int]] = field(default_factory=list)
    in_flight: Counter[Lane] = field(default_factory=Counter)
    requests: int = 0
    hits: int = 0
    answered: float | None = None
    """When it did so last, after a forward pass."""

    def as_known(self, now: float) -> Replica:
        """As the policy sees it."""
        known = self.known
        return Replica(
            known.name,
            known.fixed_seconds,
            known.seconds_per_token,
            self.in_flight[Lane.INTERACTIVE],
            self.in_flight[Lane.BULK],
            known.max_batch_tokens,
            since_answer=None if self.answered is None else now - self.answered,
        )

    def take(self, request: Request) -> None:
        """One more; what the cache has is not computed."""
        self.in_flight[request.work.lane] += request.work.tokens
        self.requests += 1
        new = [text for text in request.texts if text not in self.cache]
        self.hits += len(request.texts) - len(new)
        for text in request.texts:
            self.cache[text] = None
            self.cache.move_to_end(text)
        while len(self.cache) > self.cached:
            self.cache.popitem(last=False)
        size = TEXT_TOKENS if request.work.lane is Lane.BULK else SEARCH_TOKENS
        request.left = len(new) * size
        self.waiting[request.work.lane].append(request)

    def next_pass(self) -> float | None:
        """Begin a forward pass: searches first; its seconds, None where nothing waits."""
        room = self.known.max_batch_tokens
        self.running = []
        for lane in (Lane.INTERACTIVE, Lane.BULK):
            line = self.waiting[lane]
            if lane is Lane.BULK and self.running:  # searches that run leave little room for bulk
                room = min(room, FREE_TOKENS)
            while line and room > 0:
                tokens = min(line[0].left, room)
                self.running.append((line[0], tokens))
                room -= tokens
                line[0].left -= tokens
                if line[0].left:
                    break
                line.popleft()
        if not self.running:
            return None
        tokens = sum(tokens for _, tokens in self.running)
        return self.known.fixed_seconds + self.known.seconds_per_token * tokens if tokens else 0.0

    def end_pass(self, now: float) -> list[Request]:
        """The requests that are done with it."""
        done = [request for request, _ in self.running if not request.left]
        if done and any(tokens for _, tokens in self.running):
            self.answered = now
        for request in done:
            self.in_flight[request.work.lane] -= request.work.tokens
            self.requests -= 1
        self.running = []
        return done


class Simulation:
    """One way of choosing, from the first request to the last answer."""

    def __init__(self, replicas: list[SimulatedReplica], pick: Callable[["Simulation", RoutedRequest], int]) -> None:
        self.replicas, self._pick = replicas, pick
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self.waits: list[float] = []
        self.texts = 0
        self.choosing = 0.0
        self.choices = 0
        self.now = 0.0

    def at(self, time: float, act: Callable[[float], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (time, next(self._order), act))

    def send(self, request: Request) -> None:
        """To the replica of choice."""
        began = process_time()
        number = self._pick(self, request.work)
        self.choosing += process_time() - began
        self.choices += 1
        replica = self.replicas[number]
        idle = not replica.running
        replica.take(request)
        if idle:
            self._begin(replica, request.sent)

    def _begin(self, replica: SimulatedReplica, now: float) -> None:
        seconds = replica.next_pass()
        if seconds is not None:
            self.at(now + seconds, lambda then: self._end(replica, then))

    def _end(self, replica: SimulatedReplica, now: float) -> None:
        for request in replica.end_pass(now):
            if request.work.lane is Lane.INTERACTIVE:
                self.waits.append(now - request.sent)
            request.done(now)
        if not replica.running:
            self._begin(replica, now)

    def run(self) -> float:
        """To the end; the time then."""
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act(self.now)
        return self.now


def by(policy: Policy) -> Callable[[Simulation, RoutedRequest], int]:
    """The pick of a policy of `vecmill.core.routing`."""

    def pick(simulation: Simulation, work: RoutedRequest) -> int:
        replicas = [each.as_known(simulation.now) for each in simulation.replicas]
        chosen = policy(replicas, work)
        assert chosen is not None
        return replicas.index(chosen)

    return pick


def power_of_two(random: Random) -> Callable[[Simulation, RoutedRequest], int]:
    """As Ray's: the one with fewer requests, of two at random."""

    def pick(simulation: Simulation, work: RoutedRequest) -> int:
        two = random.sample(range(len(simulation.replicas)), min(2, len(simulation.replicas)))
        return min(two, key=lambda number: simulation.replicas[number].requests)

    return pick


def round_robin() -> Callable[[Simulation, RoutedRequest], int]:
    """Each in turn."""
    turns = count()
    return lambda simulation, work: next(turns) % len(simulation.replicas)


def two_by_wait(random: Random) -> Callable[[Simulation, RoutedRequest], int]:
    """The shorter expected wait of two at random."""
    return by(lambda replicas, work: min(sampled(replicas, random), key=lambda each: expected_wait(each, work)))


def ways(seed: int) -> dict[str, Callable[[Simulation, RoutedRequest], int]]:
    """All that are compared."""
    return {
        "ours": by(choose),
        "power of two choices": power_of_two(Random(seed)),
        "round robin": round_robin(),
        "shortest wait of two": two_by_wait(Random(seed)),
        "load alone": by(shortest_wait),
        "affinity alone": by(lambda replicas, work: owner(replicas, work, balance=float("inf"), patience=float("inf"))),
    }


def indexer(simulation: Simulation, name: str, chunks: int, ended: list[float]) -> None:
    """Send a corpus `RUNS` times, `AHEAD` requests at a time."""
    texts = [f"{name} chunk {number}" for number in range(chunks)]

    def requests() -> Iterator[list[str]]:
        for turn in range(RUNS):
            corpus = [f"{name} new {number}" for number in range(INSERTED * turn)] + texts
            yield from (corpus[at : at + TEXTS_PER_REQUEST] for at in range(0, len(corpus), TEXTS_PER_REQUEST))

    to_send = requests()
    left = [0]

    def send_next(now: float) -> None:
        part = next(to_send, None)
        if part is None:
            left[0] -= 1
            if not left[0]:
                ended.append(now)
            return
        simulation.texts += len(part)
        work = RoutedRequest(Lane.BULK, len(part) * TEXT_TOKENS, affinity_key(part))
        simulation.send(Request(work, part, now, done=send_next))

    left[0] = AHEAD
    for _ in range(AHEAD):
        simulation.at(0.0, send_next)


def people(simulation: Simulation, random: Random, per_second: float, ended: list[float], indexers: int) -> None:
    """Search, as long as anybody indexes."""

    def search(now: float) -> None:
        if len(ended) >= indexers:
            return
        text = f"question {random.randrange(10_000)}"
        simulation.send(Request(RoutedRequest(Lane.INTERACTIVE, SEARCH_TOKENS, affinity_key([text])), [text], now))
        simulation.at(now + random.expovariate(per_second), search)

    simulation.at(0.0, search)


def measure(
    options: argparse.Namespace, count: int, slow: int, indexers: int, pick: Callable[[Simulation, RoutedRequest], int]
) -> dict[str, Any]:
    """One way's figures."""
    replicas = [
        SimulatedReplica(
            Replica(
                f"replica-{number}",
                options.fixed_ms / 1000,
                options.us_per_token / 1e6 * (3 if number < slow else 1),
                max_batch_tokens=options.max_batch_tokens,
            ),
            options.cached,
        )
        for number in range(count)
    ]
    simulation = Simulation(replicas, pick)
    ended: list[float] = []
    for number in range(indexers):
        indexer(simulation, f"index {number}", options.chunks, ended)
    people(simulation, Random(options.seed), options.searches, ended, indexers)
    simulation.run()
    waits = np.array(simulation.waits) * 1000
    return {
        "search_ms": {f"p{rank}": round(float(np.percentile(waits, rank)), 2) for rank in (50, 95, 99)},
        "searches": len(waits),
        "bulk_texts_per_s": round(simulation.texts / max(ended), 1),
        "cache_hit_rate": round(sum(each.hits for each in replicas) / (simulation.texts + len(waits)), 4),
        "us_per_choice": round(1e6 * simulation.choosing / simulation.choices, 1),
    }


def show(title: str, ways: Mapping[str, dict[str, Any]]) -> None:
    """For people."""
    table = Table(title=title)
    for column in ("way", "search p50 / p95 / p99 ms", "bulk texts/s", "cache hits", "a choice"):
        table.add_column(column)
    for name, each in ways.items():
        table.add_row(
            name,
            " / ".join(f"{value:.1f}" for value in each["search_ms"].values()),
            f"{each['bulk_texts_per_s']:,.0f}",
            f"{each['cache_hit_rate']:.0%}",
            f"{each['us_per_choice']:.0f} us",
        )
    Console(stderr=True).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=3200, help="texts of each index")
    parser.add_argument("--cached", type=int, default=20_000, help="texts that a replica's cache holds")
    parser.add_argument("--searches", type=float, default=40, help="a second, of all people")
    parser.add_argument("--fixed-ms", type=float, default=6.0)
    parser.add_argument("--us-per-token", type=float, default=12.0)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for situation, (replicas, slow, indexers) in SITUATIONS.items():
        ways_here = ways(options.seed).items()
        found[situation] = {name: measure(options, replicas, slow, indexers, pick) for name, pick in ways_here}
        show(
            f"{situation}: {replicas} replicas, {indexers} indexers, {options.searches:g} searches/s", found[situation]
        )
    settings = {name: value for name, value in vars(options).items() if name != "store"}
    publish("routing", {"host": describe_host(), "settings": settings, "situations": found}, store=options.store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
