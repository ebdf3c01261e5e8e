"""A simulation of 1 to 1,000 servers behind a router: what replicas do that are not at hand.

Events: requests arrive and are routed by `vecmill.core.routing`; a server cuts forward passes as the scheduler does
(searches first, then bulk in order; a pass takes `fixed + tokens x per_token` seconds); what is cached costs no pass.
Seeded: the same arguments give the same figures. Held to closed forms and to the measured 1, 2 and 3 replicas by
benchmarks/tests/test_cluster.py.

    python -m benchmarks.cluster.simulation
    python -m benchmarks.cluster.simulation --replicas 2,1000 --gpu-price 2.5
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
from benchmarks.lib.host import describe_host
from benchmarks.lib.results import RESULTS, publish
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vecmill.core import routing
from vecmill.core.types import Lane

ROUTINGS = ("shortest-wait", "consistent-hash", "power-of-two", "round-robin")
"""`consistent-hash` is what `routing.choose` does: searches to the shortest wait, bulk to the owner of its key."""
ALL_ROWS = 64  # MAX_BATCH_SIZE
RAY_NODES = 2000
CORES = 16.0  # for each card, which is assumed
REQUEST_S, ANSWER_S_PER_TEXT = 0.94e-3, 15e-6  # docs/benchmarks.md, Outside the model: 1 text, and 64 of them, base64
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "scale.svg"


@dataclass(frozen=True)
class Server:
    """One replica, in measured figures."""

    fixed_seconds: float
    seconds_per_token: float
    max_batch_tokens: int
    free_tokens: int = 0
    """Of bulk, which may ride along with a search."""
    search_seconds: float = 0.001
    """A search outside its forward pass: HTTP, parsing, tokenizing, encoding."""
    request_seconds: float = 0.002
    """The same of a request of bulk."""

    def pass_seconds(self, tokens: int) -> float:
        """Of one forward pass."""
        return self.fixed_seconds + self.seconds_per_token * tokens


# docs/gpu.md: Qwen3-Embedding-0.6B as graphs on an H100, 1.41 ms with 16 tokens, 10.8 ms with 4,096; 1 ms and 1.9 ms
# outside the model for one text and for 64: docs/benchmarks.md.
H100_06B = Server(1.37e-3, 2.30e-6, 4096, 512, 0.96e-3, 1.9e-3)


@dataclass(frozen=True)
class Load:
    """What arrives."""

    batch: int = 64
    """Texts of a request of bulk."""
    tokens_per_text: int = 100
    connections: float = 4.0
    """Of bulk, per replica: each sends its next request when its last one is answered."""
    bulk_per_second: float | None = None
    """In place of connections: requests that arrive at random, per replica."""
    searches_per_second: float = 20.0
    """Per replica, at random."""
    search_tokens: int = 16
    unchanged: float = 0.95
    """Of a request's texts, when its corpus is indexed again."""
    same_key: float = 0.9
    """Of the requests that are sent again, those whose key is the same as before."""
    shared_cache: bool = False
    """One cache for all replicas (REDIS_URL)."""


@dataclass
class Found:
    """What came of it."""

    replicas: int
    routing: str
    sent: int = 0
    answered: int = 0
    texts: int = 0
    """That were answered while figures were taken."""
    seconds: float = 0.0
    search_ms: list[float] = field(default_factory=list)
    bulk_seconds: list[float] = field(default_factory=list)
    looked_up: int = 0
    hits: int = 0
    busy_seconds: float = 0.0
    """On the devices, all together."""

    @property
    def texts_per_second(self) -> float:
        """Of all replicas together."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Of the texts that were sent again; None where none were."""
        return self.hits / self.looked_up if self.looked_up else None

    def percentile(self, percent: float) -> float:
        """Of the searches, in milliseconds."""
        return float(np.percentile(self.search_ms, percent)) if self.search_ms else float("nan")


class Chooser:
    """`vecmill.core.routing` over arrays: a thousand replicas are looked at for each request.

    All replicas are equal but for what they have queued. A test holds every choice to the module's own.
    """

    def __init__(self, server: Server, replicas: int, kind: str, random: Random) -> None:
        self.interactive = np.zeros(replicas, np.int64)
        self.bulk = np.zeros(replicas, np.int64)
        """Tokens in progress."""
        self.answered = np.full(replicas, -np.inf)
        """When an answer came last that took a forward pass."""
        self.rest = np.zeros(replicas)
        """Seconds of the pass that ran then."""
        self._server, self._kind, self._random, self._replicas = server, kind, random, replicas
        self._turn = count()
        self._names = np.array([routing._hash_of_name(f"replica-{number}") for number in range(replicas)], np.uint64)

    def replica(self, number: int, now: float) -> routing.Replica:
        """As `routing` knows it."""
        server, since = self._server, now - float(self.answered[number])
        return routing.Replica(
            f"replica-{number}",
            server.fixed_seconds,
            server.seconds_per_token,
            int(self.interactive[number]),
            int(self.bulk[number]),
            server.max_batch_tokens,
            since_answer=since if np.isfinite(since) else None,
            rest_of_pass=float(self.rest[number]),
            overhead_seconds=server.search_seconds,
        )

    def choose(self, work: routing.RoutedRequest, now: float) -> int:
        """The number of the replica for a request."""
        if self._replicas == 1:
            return 0
        if self._kind == "round-robin":
            return next(self._turn) % self._replicas
        if self._kind == "power-of-two":
            two = [self.replica(number, now) for number in self._random.sample(range(self._replicas), 2)]
            chosen = routing.shortest_wait(two, work)
            assert chosen is not None
            return int(chosen.name.rpartition("-")[2])
        if self._kind == "consistent-hash" and work.lane is Lane.BULK:
            return self._owner(work)
        return self._shortest(work, now)

    def _shortest(self, work: routing.RoutedRequest, now: float) -> int:
        server, search = self._server, work.lane is Lane.INTERACTIVE
        ahead = self.interactive if search else self.interactive + self.bulk
        waits = server.fixed_seconds + server.seconds_per_token * (ahead + work.tokens)
        if search:
            waits += self._rests_of_passes(now)
        return self._preferred(np.flatnonzero(waits <= routing.ABOUT_EQUAL * waits.min()), work.key)

    def _rests_of_passes(self, now: float) -> NDArray[np.float64]:
        """`routing.rest_of_pass` of each."""
        server = self._server
        tokens = np.minimum(self.bulk, server.max_batch_tokens)
        seconds = server.fixed_seconds + server.seconds_per_token * tokens
        known = np.isfinite(self.answered)
        since = np.where(known, now - self.answered, 0.0) + server.search_seconds
        over = (since - self.rest) / seconds
        ended = np.maximum(0.0, np.floor(over) + 1)
        begun = over + 1 - ended
        uncertain_end = np.minimum(0.5, routing.DRIFT * (1 + ended))
        uncertain_begin = np.minimum(0.5, routing.DRIFT * ended)
        missed = np.maximum(0.0, 1 - (1 - begun) / uncertain_end) / 2
        still_before = np.maximum(0.0, 1 - begun / np.maximum(uncertain_begin, 1e-300)) / 2 * (ended > 0)
        rest = seconds * np.where(known, 1 - begun + missed - still_before, 0.5)
        return np.where(tokens > 0, rest, 0.0)

    def _owner(self, work: routing.RoutedRequest) -> int:
        queued, per_token = self.interactive + self.bulk, self._server.seconds_per_token
        speed = self._replicas / per_token
        most = routing.BALANCE * (int(queued.sum()) + work.tokens) / speed
        one_pass = per_token * self._server.max_batch_tokens
        chosen = self._preferred(np.flatnonzero(per_token * queued <= max(most, one_pass)), work.key)
        if per_token * queued[chosen] > routing.PATIENCE * one_pass and len(idle := np.flatnonzero(queued == 0)):
            return self._preferred(idle, work.key)
        return chosen

    def _preferred(self, candidates: NDArray[np.intp], key: int) -> int:
        if len(candidates) == 1:
            return int(candidates[0])
        return int(candidates[np.argmax(_mixed(np.uint64(key) ^ self._names[candidates]) >> np.uint64(12))])


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`routing._mixed` of an array: splitmix64."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


class _Request:
    """A search, or a request of bulk."""

    __slots__ = ("again", "arrived", "interactive", "key", "open", "passed", "texts", "tokens", "where")

    def __init__(self, arrived: float, key: int, texts: int, tokens: int, *, interactive: bool, again: bool) -> None:
        self.arrived, self.key, self.texts, self.tokens = arrived, key, texts, tokens
        self.interactive, self.again = interactive, again
        self.open = 0
        """Texts that have no vector yet."""
        self.where = 0
        self.passed = False
        """Whether a forward pass was needed."""


class _Node:
    """A server: what waits, and the pass that runs."""

    __slots__ = ("bulk", "ends", "running", "searches")

    def __init__(self) -> None:
        self.searches: deque[_Request] = deque()
        self.bulk: deque[list[Any]] = deque()
        """Each request with its texts that wait."""
        self.running: list[tuple[_Request, int]] = []
        """Each request with its texts in the pass."""
        self.ends = 0.0
        """When the pass will, or did."""


class Simulation:
    """One run: a cold part with new texts, and then, where asked for, one in which the same are sent again."""

    def __init__(self, server: Server, load: Load, replicas: int, kind: str, seed: int = 0) -> None:
        self._server, self._load, self._replicas = server, load, replicas
        self._random = Random(seed)
        self._chooser = Chooser(server, replicas, kind, Random(seed + 1))
        self._nodes = [_Node() for _ in range(replicas)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._now = 0.0
        self._kept: list[set[int]] = [set() for _ in range(1 if load.shared_cache else replicas)]
        self._sent_keys: list[int] = []
        self._again: deque[int] = deque()
        self._stop_at = 0.0
        self._measure_from = 0.0
        self._new_texts = True
        """False once only what was sent before is sent again."""
        self.found = Found(replicas, kind)

    def cold(self, seconds: float, *, warm_up: float = 0.2) -> Found:
        """New texts and searches for so many seconds; figures are taken after a share of `warm_up`.

        What is in progress at the end is answered, and counts for conservation alone.
        """
        self._measure_from, self._stop_at = self._now + warm_up * seconds, self._now + seconds
        self._begin()
        self._run()
        self.found.seconds = self._stop_at - self._measure_from
        return self.found

    def again(self, seconds: float) -> Found:
        """The texts of the cold part once more, in the same order, for at most so many seconds."""
        before = self.found
        self.found = Found(before.replicas, before.routing, before.sent, before.answered)
        self._again, self._new_texts = deque(self._sent_keys), False
        self._measure_from, self._stop_at = self._now, self._now + seconds
        self._begin()
        self._run()
        self.found.seconds = max(self._now - self._measure_from, 1e-9)
        return self.found

    def _begin(self) -> None:
        load = self._load
        if load.bulk_per_second is None:
            for _ in range(round(load.connections * self._replicas)):
                self._at(self._now, self._send_bulk)
        elif load.bulk_per_second > 0:
            self._at(self._gap(load.bulk_per_second), self._arrive_bulk)
        if load.searches_per_second > 0:
            self._at(self._gap(load.searches_per_second), self._arrive_search)

    def _gap(self, rate: float) -> float:
        return self._now + self._random.expovariate(rate * self._replicas)

    def _at(self, time: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), act, arguments))

    def _run(self) -> None:
        while self._events:
            self._now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)

    def _arrive_bulk(self) -> None:
        assert self._load.bulk_per_second is not None
        if self._now < self._stop_at:
            self._send_bulk()
            self._at(self._gap(self._load.bulk_per_second), self._arrive_bulk)

    def _arrive_search(self) -> None:
        if self._now >= self._stop_at:
            return
        key = self._random.getrandbits(64)
        self._send(_Request(self._now, key, 1, self._load.search_tokens, interactive=True, again=False))
        self._at(self._gap(self._load.searches_per_second), self._arrive_search)

    def _send_bulk(self) -> None:
        load, again = self._load, not self._new_texts
        if self._now >= self._stop_at or (again and not self._again):
            return
        key = self._again.popleft() if again else self._random.getrandbits(64)
        if not again:
            self._sent_keys.append(key)
        tokens = load.batch * load.tokens_per_text
        self._send(_Request(self._now, key, load.batch, tokens, interactive=False, again=again))

    def _send(self, request: _Request) -> None:
        lane = Lane.INTERACTIVE if request.interactive else Lane.BULK
        key = request.key
        if request.again and self._random.random() >= self._load.same_key:
            key = self._random.getrandbits(64)
        where = request.where = self._chooser.choose(routing.RoutedRequest(lane, request.tokens, key), self._now)
        (self._chooser.interactive if request.interactive else self._chooser.bulk)[where] += request.tokens
        self.found.sent += 1
        outside = self._server.search_seconds if request.interactive else self._server.request_seconds
        self._at(self._now + outside / 2, self._enqueue, request)

    def _enqueue(self, request: _Request) -> None:
        node = self._nodes[request.where]
        request.open = request.texts - self._found_in_cache(request)
        request.passed = request.open > 0
        if not request.open:
            self._answer(request)
        elif request.interactive:
            node.searches.append(request)
        else:
            node.bulk.append([request, request.open])
        if not node.running:
            self._cut(request.where)

    def _found_in_cache(self, request: _Request) -> int:
        if request.interactive:
            return 0
        kept = self._kept[0 if self._load.shared_cache else request.where]
        hits = 0
        if request.again:
            self.found.looked_up += request.texts
            hits = round(self._load.unchanged * request.texts) if request.key in kept else 0
            self.found.hits += hits
        kept.add(request.key)
        return hits

    def _cut(self, where: int) -> None:
        """Begin the next forward pass, if anything waits."""
        node, server, per_text = self._nodes[where], self._server, self._load.tokens_per_text
        room, rows, tokens = server.max_batch_tokens, ALL_ROWS, 0
        taken: list[tuple[_Request, int]] = []
        while node.searches and room >= self._load.search_tokens and rows:
            taken.append((node.searches.popleft(), 1))
            room, rows, tokens = room - self._load.search_tokens, rows - 1, tokens + self._load.search_tokens
        if taken:
            room = min(room, server.free_tokens)
        while node.bulk and rows and (room >= per_text or not taken):
            first = node.bulk[0]
            texts = min(first[1], rows, max(1, room // per_text))
            taken.append((first[0], texts))
            first[1] -= texts
            room, rows, tokens = room - texts * per_text, rows - texts, tokens + texts * per_text
            if not first[1]:
                node.bulk.popleft()
        node.running = taken
        if taken:
            seconds = server.pass_seconds(tokens)
            self.found.busy_seconds += seconds
            node.ends = self._now + seconds
            self._at(node.ends, self._end_pass, where)

    def _end_pass(self, where: int) -> None:
        node = self._nodes[where]
        for request, texts in node.running:
            request.open -= texts
            if not request.interactive and self._measure_from <= self._now <= self._stop_at:
                self.found.texts += texts
            if not request.open:
                self._answer(request)
        self._cut(where)

    def _answer(self, request: _Request) -> None:
        outside = self._server.search_seconds if request.interactive else self._server.request_seconds
        self._at(self._now + outside / 2, self._answered, request)

    def _answered(self, request: _Request) -> None:
        (self._chooser.interactive if request.interactive else self._chooser.bulk)[request.where] -= request.tokens
        if request.passed:
            self._chooser.answered[request.where] = self._now
            self._chooser.rest[request.where] = max(0.0, self._nodes[request.where].ends - self._now)
        self.found.answered += 1
        measured = self._measure_from <= request.arrived <= self._stop_at
        took = self._now - request.arrived
        if request.interactive:
            if measured:
                self.found.search_ms.append(1e3 * took)
            return
        if measured:
            self.found.bulk_seconds.append(took)
        if self._load.bulk_per_second is None:
            self._send_bulk()


def seconds_for(server: Server, load: Load, replicas: int, requests: int = 20_000) -> float:
    """So long that about so many requests of bulk are sent in all, at least 20 for each replica, at most 20 seconds."""
    each = server.seconds_per_token * load.batch * load.tokens_per_text
    return min(20.0, max(20 * each, requests / replicas * each))


# What all replicas share, or what each needs beside its card


@dataclass(frozen=True)
class Part:
    """Something that is not a GPU, and what of it a request takes."""

    name: str
    per_replica: bool
    """Whether each replica brings its own."""
    busy_seconds: Callable[[Server, Load, float, float], float]
    """Of it, in a second in which a replica answers so many texts (and so many searches)."""
    capacity: float
    """Busy seconds that it has in a second."""
    source: str
    then: str
    """What to do when it is full."""


def breaking(parts: Sequence[Part], server: Server, load: Load, texts: float) -> list[dict[str, Any]]:
    """For each part, at how many replicas it is full (for one that each replica brings: its use), the first first."""
    rows = []
    for part in parts:
        use = part.busy_seconds(server, load, texts, load.searches_per_second)
        full = part.capacity / use if use else float("inf")
        rows.append(
            {
                "part": part.name,
                "use_per_replica": use,
                "full_at_replicas": None if part.per_replica else full,
                "use_of_own_percent": 100 / full if part.per_replica else None,
                "source": part.source,
                "then": part.then,
            }
        )
    return sorted(rows, key=lambda row: row["full_at_replicas"] or float("inf"))


def parts_of(shared: Mapping[str, float]) -> list[Part]:
    """The parts, by what `benchmarks.cluster.shared_parts` measured (seconds of a core)."""
    source = "`benchmarks.cluster.shared_parts`"

    def requests(load: Load, texts: float, searches: float) -> float:
        return texts / load.batch + searches

    return [
        Part(
            "Redis, one instance",
            False,
            lambda server, load, texts, searches: (
                texts * (shared["redis_look_up_s"] + shared["redis_put_s"])
                + searches * (shared["redis_look_up_s"] + shared["redis_put_s"])
            ),
            1.0,
            source,
            "a cache for each replica with bulk by consistent hash, or one Redis for each group of replicas",
        ),
        Part(
            "HAProxy, one core",
            False,
            lambda server, load, texts, searches: (
                texts / load.batch * shared["proxy_bulk_s"] + searches * shared["proxy_search_s"]
            ),
            1.0,
            source,
            "more threads (`nbthread`), then several proxies behind DNS; bulk straight to the replicas",
        ),
        Part(
            "a replica's own cores (tokenizing, HTTP, JSON)",
            True,
            lambda server, load, texts, searches: (
                texts * load.tokens_per_text * shared["tokenize_s_per_token"]
                + requests(load, texts, searches) * REQUEST_S
                + texts * ANSWER_S_PER_TEXT
            ),
            CORES,
            source + " and docs/benchmarks.md, Outside the model; 16 cores for each card are assumed",
            "more cores for each card, TOKENIZATION_WORKERS; more servers do not help a server that is short of cores",
        ),
        Part(
            "Ray Serve's controller, one process",
            False,
            lambda server, load, texts, searches: 1 / RAY_NODES,
            1.0,
            "not measured here: Ray's own scalability envelope (release/benchmarks/README.md) states 2,000 nodes; one "
            "GPU a node is taken",
            "several clusters, each with its own controller, behind one proxy",
        ),
    ]


# The plan


@dataclass(frozen=True)
class Prices:
    """Assumptions about money."""

    gpu_hour: float
    """A GPU with its share of the machine, in dollars."""

    def per_million_texts(self, texts_per_second: float, replicas: int) -> float:
        """Dollars."""
        return self.gpu_hour * replicas / 3600 / texts_per_second * 1e6 if texts_per_second else float("inf")


def plan(server: Server, load: Load, replicas: Sequence[int], prices: Prices, seed: int) -> list[dict[str, Any]]:
    """A row for each number of replicas and routing."""
    rows = []
    for number in replicas:
        for kind in ROUTINGS:
            began = perf_counter()
            seconds = seconds_for(server, load, number)
            run = Simulation(server, load, number, kind, seed)
            cold = run.cold(seconds)
            # In three quarters of the time nearly all requests of the cold part come again, whatever is cached.
            again = run.again(2 * seconds)
            assert again.sent == again.answered
            rows.append(
                {
                    "replicas": number,
                    "routing": kind,
                    "texts_per_s": round(cold.texts_per_second),
                    "of_ideal_percent": round(100 * cold.texts_per_second / number / _alone(server, load), 1),
                    "search_p50_ms": round(cold.percentile(50), 2),
                    "search_p99_ms": round(cold.percentile(99), 2),
                    "hit_rate_percent": round(100 * (again.hit_rate or 0.0), 1),
                    "dollars_per_million_texts": round(prices.per_million_texts(cold.texts_per_second, number), 4),
                    "simulated_s": round(seconds, 2),
                    "took_s": round(perf_counter() - began, 1),
                }
            )
            print(f"{number} replicas, {kind}: {rows[-1]['took_s']} s", file=sys.stderr, flush=True)
    return rows


def _alone(server: Server, load: Load) -> float:
    """Texts a second of full passes."""
    texts = min(server.max_batch_tokens // load.tokens_per_text, ALL_ROWS)
    return texts / server.pass_seconds(texts * load.tokens_per_text)


def measured_server(result: Mapping[str, Any]) -> Server:
    """The simulated server of a stored result of `benchmarks.cluster.replicas`, as that server measured itself."""
    forward = result["simulated"]["forward_pass"]
    return Server(
        forward["fixed_ms"] / 1e3,
        forward["us_per_token"] / 1e6,
        forward["max_batch_tokens"],
        forward["free_tokens"],
        0.96e-3,
        1.9e-3,
    )


def measured_load(result: Mapping[str, Any], tokens_per_text: float) -> Load:
    """What `benchmarks.cluster.replicas` sent of bulk, per replica."""
    settings = result["settings"]
    return Load(
        batch=settings["batch"],
        tokens_per_text=round(tokens_per_text),
        connections=settings["connections"],
        searches_per_second=0,
    )


def validate(result: Mapping[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Measured and simulated figures of 1, 2 and 3 replicas."""
    server = measured_server(result)
    load = measured_load(result, result["simulated"]["tokens_per_text"])
    rows = []
    for name, kind in (("policy", "consistent-hash"), ("round-robin", "round-robin")):
        for number, side in result["simulated"]["routings"].get(name, {}).items():
            replicas = int(number)
            alone = Simulation(server, load, replicas, kind, seed).cold(30.0)
            with_person = replace(load, searches_per_second=1 / result["settings"]["interval"] / replicas)
            beside = Simulation(server, with_person, replicas, kind, seed).cold(60.0)
            measured = side["texts_per_s"]["median"]
            rows.append(
                {
                    "replicas": replicas,
                    "routing": name,
                    "measured_texts_per_s": measured,
                    "simulated_texts_per_s": round(alone.texts_per_second, 1),
                    "off_percent": round(100 * (alone.texts_per_second / measured - 1), 1),
                    "off_the_rounds_percent": round(_off(alone.texts_per_second, side["texts_per_s"]), 1),
                    "measured_person_ms": [
                        side["person_beside_bulk_ms"][each]["median"] for each in ("p50", "p95", "p99")
                    ],
                    "simulated_person_ms": [round(beside.percentile(each), 1) for each in (50, 95, 99)],
                }
            )
    return rows


def _off(simulated: float, measured: Mapping[str, Any]) -> float:
    """Percent from the nearest of the measured rounds' range; 0 within it."""
    nearest: float = min(max(simulated, measured["min"]), measured["max"])
    return 100 * (simulated / nearest - 1)


def newest(name: str) -> dict[str, Any] | None:
    """The newest stored result of a benchmark; None where there is none."""
    paths = sorted(RESULTS.glob(f"{name}-20*.json"))
    found: dict[str, Any] | None = json.loads(paths[-1].read_text()) if paths else None
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Throughput, the searches' p99 and the hit rate over the number of GPUs, as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vecmill"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, name, title in (
        (axes[0], "texts_per_s", "texts a second"),
        (axes[1], "search_p99_ms", "p99 of a search, ms"),
        (axes[2], "hit_rate_percent", "cache hits when indexed again, %"),
    ):
        for kind in ROUTINGS:
            of_kind = [row for row in rows if row["routing"] == kind]
            axis.plot(
                [row["replicas"] for row in of_kind], [row[name] for row in of_kind], marker="o", ms=3, label=kind
            )
        axis.set(xscale="log", xlabel="GPUs", title=title)
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(0, 100)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def print_summary(
    rows: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]], checked: Sequence[Any]
) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    table = Table(
        "GPUs", "routing", "texts/s", "% of ideal", "search p50, p99 ms", "hits again %", "$ per million texts"
    )
    for row in rows:
        table.add_row(
            str(row["replicas"]),
            row["routing"],
            f"{row['texts_per_s']:,}",
            str(row["of_ideal_percent"]),
            f"{row['search_p50_ms']}, {row['search_p99_ms']}",
            str(row["hit_rate_percent"]),
            str(row["dollars_per_million_texts"]),
        )
    console.print(table)
    for row in limits:
        full = row["full_at_replicas"]
        use = f"full at {full:,.1f} replicas" if full else f"{row['use_of_own_percent']:.0f} % of its own are used"
        console.print(f"{row['part']}: {use}; then {row['then']}", soft_wrap=True)
    for row in checked:
        console.print(row, soft_wrap=True)


def main() -> int:
    """Simulate, print, draw, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="2,3,10,30,100,300,1000", help="default: %(default)s")
    parser.add_argument("--gpu-price", type=float, default=2.5, help="dollars an hour of one (default: %(default)s)")
    parser.add_argument("--searches", type=float, default=20.0, help="a second for each GPU (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of a text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-store", action="store_true", help="write neither result nor picture")
    options = parser.parse_args()
    load = Load(tokens_per_text=options.tokens, searches_per_second=options.searches)
    numbers = [int(number) for number in options.replicas.split(",")]
    rows = plan(H100_06B, load, numbers, Prices(options.gpu_price), options.seed)
    shared, measured = newest("shared_parts"), newest("replicas")
    one = rows[0]["texts_per_s"] / rows[0]["replicas"]
    limits = breaking(parts_of(shared["seconds"]), H100_06B, load, one) if shared else []
    checked = validate(measured, options.seed) if measured else []
    print_summary(rows, limits, checked)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    if not options.no_store:
        draw(rows, PICTURE)
    publish(
        "simulation",
        {"host": describe_host(), "settings": settings, "plan": rows, "limits": limits, "validation": checked},
        store=not options.no_store,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
