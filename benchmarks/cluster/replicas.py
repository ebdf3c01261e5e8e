"""One, two and three replicas: texts a second of bulk, and a person's searches beside it, against one replica.

Every replica is a server in a process of its own. The client sends each request itself: to the replica that
`core.routing` chooses from what this client has in progress (`policy`), in turn (`round-robin`), or by the policy but
with all searches to the first (`searches-to-one`: what one replica takes while the others use the same cores). Forward
passes sleep (`simulated`), so that the machine's cores are not the limit, or are the real model's (`real`), where they
are.

    python -m benchmarks.cluster.replicas
    python -m benchmarks.cluster.replicas --models simulated --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter, process_time
from typing import Any

import httpx
from benchmarks.lib.figures import in_turns, print_disturbance, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.results import keep_so_far, publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from rich.console import Console
from rich.table import Table

from vecmill.core import routing
from vecmill.core.types import Lane
from vecmill.tools.bench.load_generator import TargetClient, outcomes_of, run
from vecmill.tools.bench.target import BenchTarget, Payload, TargetApi, tokens_of
from vecmill.tools.bench.workload import Requests, read_workload
from vecmill.tools.http_client import Answer

MODELS = ("simulated", "real")
ONE_SEARCHED = "searches-to-one"
"""One replica's latency, on a machine that is as busy as several make it."""
ROUTINGS = ("policy", "round-robin", ONE_SEARCHED)
FIXED_MS, US_PER_TOKEN = 4.0, 60.0
"""Of a simulated pass: 16,000 tokens a second. At 25 us three servers and the client want most of two cores, and a
person waits for those: 9 % longer at p95, whichever replica answers (`searches-to-one`)."""
CHARACTERS_PER_TOKEN = 3.5
WARM_UP_S = 1.0
LEAD_S = 0.7  # of bulk before its answers count: until all connections are on their way
LEAST_EFFICIENCY = 95.0
MOST_SLOWER = 1.1  # a person's p95 beside bulk, against one replica: what is within the noise of a p95


@dataclass(frozen=True)
class Plan:
    """What is sent."""

    texts: Sequence[str]
    batch: int
    connections: int
    """Of bulk, for each replica."""
    seconds: float
    rounds: int
    interval: float
    """Seconds between the person's searches."""


@dataclass
class Endpoint:
    """A replica as its clients see it."""

    replica: routing.Replica
    bulk: TargetClient
    person: TargetClient
    sent_bulk: int = 0
    sent_interactive: int = 0
    """Tokens in progress, by estimate."""
    answer: routing.LastAnswer = field(default_factory=routing.LastAnswer)
    """By `perf_counter`."""

    def now(self) -> routing.Replica:
        """With what is in progress."""
        return replace(
            self.replica,
            queued_bulk=self.sent_bulk,
            queued_interactive=self.sent_interactive,
            since_answer=self.answer.since(perf_counter()),
            rest_of_pass=self.answer.rest_of_pass,
            overhead_seconds=self.answer.overhead_seconds,
        )

    def saw(self, answer: Answer, lane: Lane) -> Answer:
        """Remember when it came."""
        took, rest = (float(answer.headers.get(name, 0.0)) / 1e3 for name in ("x-total-time", "x-rest-of-pass"))
        self.answer = self.answer.followed_by(lane, answer.started, perf_counter(), took, rest)
        return answer


class Router:
    """Chooses a replica for each request, and counts what is in progress."""

    def __init__(self, endpoints: Sequence[Endpoint], kind: str) -> None:
        self._endpoints, self._kind = endpoints, kind
        self._turn = count()

    async def bulk(self, payload: Payload) -> Answer:
        """Send a request of bulk."""
        tokens = round(payload.text_bytes / CHARACTERS_PER_TOKEN)
        key = routing.affinity_key([payload.body.decode()])
        chosen = self._chosen(routing.RoutedRequest(Lane.BULK, tokens, key))
        chosen.sent_bulk += tokens
        try:
            return chosen.saw(await chosen.bulk.post(payload.body), Lane.BULK)
        finally:
            chosen.sent_bulk -= tokens

    async def search(self, body: bytes, due: float) -> Answer:
        """Send a person's query."""
        chosen = self._chosen(routing.RoutedRequest(Lane.INTERACTIVE, 16, routing.affinity_key([body.decode()])))
        chosen.sent_interactive += 16
        try:
            return chosen.saw(await chosen.person.post(body, due), Lane.INTERACTIVE)
        finally:
            chosen.sent_interactive -= 16

    def _chosen(self, work: routing.RoutedRequest) -> Endpoint:
        if self._kind == ONE_SEARCHED and work.lane is Lane.INTERACTIVE:
            return self._endpoints[0]
        if self._kind == "round-robin":
            return self._endpoints[next(self._turn) % len(self._endpoints)]
        replica = routing.choose([endpoint.now() for endpoint in self._endpoints], work)
        assert replica is not None  # none is draining
        return next(endpoint for endpoint in self._endpoints if endpoint.replica.name == replica.name)


@dataclass(frozen=True)
class Measured:
    """Bulk alone, then bulk beside a person, for so many replicas."""

    texts_per_second: float
    beside_texts_per_second: float
    person_ms: Mapping[str, float]
    tokens_per_text: float
    client_cpu: float
    errors: int
    other_cores: float


@contextmanager
def started(model: str, replicas: int, options: Sequence[str], fit: tuple[float, float]) -> Iterator[list[str]]:
    """The replicas' addresses. They start one after another: beside each other, warm-up would measure the others."""
    with ExitStack() as servers:
        urls = []
        for _ in range(replicas):
            port = free_port()
            command = vecmill_command(port, *options)
            if model == "simulated":
                module = [sys.executable, "-m", "benchmarks.cluster.simulated_server", *map(str, fit)]
                command = [*module, *command[command.index("serve") + 1 :]]
            environment = {"TORCH_COMPILE": "false", "TOKENIZATION_WORKERS": "1"}
            urls.append(servers.enter_context(running(command, port, "/ready", environment)).url)
        yield urls


def forward_of(url: str) -> dict[str, Any]:
    """What the server measured of its forward passes."""
    capabilities: dict[str, Any] = httpx.get(f"{url}/capabilities", timeout=10.0).json()
    forward: dict[str, Any]
    (forward,) = capabilities["forward_passes"].values()
    return forward


async def measure(urls: Sequence[str], kind: str, plan: Plan, requests: Requests) -> Measured:
    """Measure these replicas together."""
    async with AsyncExitStack() as stack:
        endpoints = []
        for url in urls:
            forward = forward_of(url)
            known = routing.Replica(
                url,
                forward["fixed_ms"] / 1e3,
                forward["us_per_token"] / 1e6,
                max_batch_tokens=forward["max_batch_tokens"],
            )
            target = BenchTarget(url, TargetApi.OPENAI)
            bulk = await stack.enter_async_context(TargetClient(target, plan.connections * len(urls)))
            endpoints.append(Endpoint(known, bulk, await stack.enter_async_context(TargetClient(target))))
        router = Router(endpoints, kind)
        connections = plan.connections * len(urls)
        await _bulk(router, requests, connections, WARM_UP_S)
        with watched() as contention:
            cpu, began = process_time(), perf_counter()
            alone, failed, tokens_per_text = await _bulk(router, requests, connections, plan.seconds)
            cores = (process_time() - cpu) / (perf_counter() - began)
            bulk_task = asyncio.create_task(_bulk(router, requests, connections, plan.seconds))
            answers = await _searches(router, requests.of_queries(), plan)
            beside, failed_beside, _ = await bulk_task
        person = outcomes_of(answers)
        latency = person.latency_ms
        assert latency is not None, person.first_error
        ms = {"p50": latency.p50, "p95": latency.p95, "p99": latency.p99}
        errors = failed + failed_beside + sum(person.errors.values())
        return Measured(alone, beside, ms, tokens_per_text, cores, errors, contention.other_cores)


async def _bulk(router: Router, requests: Requests, connections: int, seconds: float) -> tuple[float, int, float]:
    """Texts a second, how many requests failed, and tokens of a text, from LEAD_S on."""
    payloads = requests.of_texts()
    began = perf_counter() + LEAD_S
    texts = tokens = failed = 0

    async def connection() -> None:
        nonlocal texts, tokens, failed
        while perf_counter() < began + seconds:
            payload = next(payloads)
            answer = await router.bulk(payload)
            failed += answer.error is not None
            # What is answered before or later is not counted, nor is that time.
            if answer.error is None and began <= perf_counter() <= began + seconds:
                texts += payload.texts
                tokens += tokens_of(answer.content, answer.headers) or 0

    await asyncio.gather(*(connection() for _ in range(connections)))
    return texts / seconds, failed, tokens / max(texts, 1)


async def _searches(router: Router, queries: Iterator[bytes], plan: Plan) -> list[Answer]:
    began = perf_counter() + LEAD_S
    tasks = []
    async with asyncio.TaskGroup() as group:
        for number in range(max(1, round((plan.seconds - 0.2) / plan.interval))):
            due = began + number * plan.interval
            await asyncio.sleep(max(0.0, due - perf_counter()))
            tasks.append(group.create_task(router.search(next(queries), due)))
    return [task.result() for task in tasks]


def measure_rounds(urls: Sequence[str], plan: Plan, kinds: Sequence[str], most: int) -> dict[str, dict[int, Any]]:
    """Each number of replicas under each routing, in turns."""
    requests = Requests(BenchTarget(urls[0], TargetApi.OPENAI), plan.texts, plan.batch)
    found: dict[str, dict[int, list[Measured]]] = {kind: {} for kind in kinds}
    sides = [("policy" if number == 1 else kind, number) for kind in kinds for number in range(1, most + 1)]
    for kind, number in in_turns(list(dict.fromkeys(sides)), plan.rounds):
        print(f"{number} replicas, {kind}", file=sys.stderr, flush=True)
        found.setdefault(kind, {}).setdefault(number, []).append(run(measure(urls[:number], kind, plan, requests)))
    one = found["policy"][1]
    return {
        kind: {number: _summary(rounds, one, number) for number, rounds in {1: one, **sides}.items()}
        for kind, sides in found.items()
    }


def _summary(rounds: Sequence[Measured], one: Sequence[Measured], number: int) -> dict[str, Any]:
    efficiency = [
        100 * each.texts_per_second / (number * alone.texts_per_second) for each, alone in zip(rounds, one, strict=True)
    ]
    slower = [each.person_ms["p95"] / alone.person_ms["p95"] for each, alone in zip(rounds, one, strict=True)]
    return {
        "texts_per_s": spread([each.texts_per_second for each in rounds]),
        "texts_per_s_beside_person": spread([each.beside_texts_per_second for each in rounds]),
        "person_beside_bulk_ms": {
            name: spread([each.person_ms[name] for each in rounds]) for name in ("p50", "p95", "p99")
        },
        "efficiency_percent": spread(efficiency),
        "p95_over_one_replica": spread(slower),
        "tokens_per_text": spread([each.tokens_per_text for each in rounds]),
        "client_cpu": spread([each.client_cpu for each in rounds]),
        "errors": sum(each.errors for each in rounds),
        "other_cores": spread([each.other_cores for each in rounds]),
    }


def print_summary(found: Mapping[str, Any]) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    for model, sides in found.items():
        table = Table(title=f"{model} forward passes", title_justify="left")
        for heading in ("routing", "replicas"):
            table.add_column(heading, no_wrap=True)
        for heading in ("texts/s", "% of ideal", "beside a person", "person p50, p95, p99 ms", "p95 / one's", "errors"):
            table.add_column(heading, justify="right")
        for kind, numbers in sides["routings"].items():
            for number, figures in numbers.items():
                person = figures["person_beside_bulk_ms"]
                table.add_row(
                    kind,
                    str(number),
                    shown(figures["texts_per_s"]),
                    shown(figures["efficiency_percent"]),
                    shown(figures["texts_per_s_beside_person"]),
                    ", ".join(f"{person[name]['median']:.3g}" for name in ("p50", "p95", "p99")),
                    shown(figures["p95_over_one_replica"]),
                    str(figures["errors"]),
                )
        console.print(table)
        worst = max(side["other_cores"]["max"] for numbers in sides["routings"].values() for side in numbers.values())
        print_disturbance(console, worst)
    if "simulated" in found:
        policy = found["simulated"]["routings"]["policy"]
        most = max(policy, key=int)
        efficiency = policy[most]["efficiency_percent"]["median"]
        slower = policy[most]["p95_over_one_replica"]["median"]
        met = "met" if efficiency >= LEAST_EFFICIENCY else "MISSED"
        console.print(f"{most} simulated replicas: {efficiency:.1f} % of ideal, at least {LEAST_EFFICIENCY:g} %: {met}")
        met = "met" if slower <= MOST_SLOWER else "MISSED"
        console.print(f"a person's p95 over one replica's: {slower:.2f}, target at most {MOST_SLOWER:g}: {met}")


def add_plan_arguments(parser: argparse.ArgumentParser, *, seconds: float, rounds: int) -> None:
    """What is sent, how often, and what a simulated pass takes; `seconds` and `rounds` are defaults."""
    parser.add_argument("--texts", type=int, default=2048, help="different ones (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="texts per request (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=4, help="of bulk, per replica (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="of each stretch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--interval", type=float, default=0.05, help="between searches (default: %(default)s)")
    parser.add_argument("--fixed-ms", type=float, default=FIXED_MS, help="of a simulated pass (default: %(default)s)")
    parser.add_argument("--us-per-token", type=float, default=US_PER_TOKEN, help="default: %(default)s")


def plan_of(options: argparse.Namespace) -> Plan:
    """From parsed arguments."""
    texts = read_workload(None, options.texts).texts
    return Plan(texts, options.batch, options.connections, options.seconds, options.rounds, options.interval)


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of simulated,real (default: %(default)s)")
    parser.add_argument("--routings", default=",".join(ROUTINGS), help="default: %(default)s")
    parser.add_argument("--replicas", type=int, default=3, help="the most (default: %(default)s)")
    add_plan_arguments(parser, seconds=4, rounds=2)
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    plan = plan_of(options)
    fit = (options.fixed_ms, options.us_per_token)
    found: dict[str, Any] = {}
    for model in options.models.split(","):
        with started(model, options.replicas, options.serve, fit) as urls:
            kinds = options.routings.split(",") if model == "simulated" else ["policy"]
            sides = measure_rounds(urls, plan, kinds, options.replicas)
            tokens = sides["policy"][1]["tokens_per_text"]["median"]
            found[model] = {"forward_pass": forward_of(urls[0]), "tokens_per_text": tokens, "routings": sides}
            keep_so_far("replicas", found)
    print_summary(found)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    publish("replicas", {"host": describe_host(), "settings": settings, **found}, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
