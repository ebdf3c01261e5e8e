"""How many texts per second are answered that were all computed before, and what a new text pays for the cache."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.figures import in_turns
from benchmarks.lib.minilm import bundled_model
from benchmarks.lib.servers import RunningServer, free_port, running, vecmill_command
from benchmarks.lib.timed_http import TimedConnection
from benchmarks.serving.echo import echo_server
from benchmarks.serving.wide_model import write_wide_model

PATH = "/v1/embeddings"
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
SERVE = ("--rerank-model", "none", "--torch-compile", "false")
GIGABYTES_10 = str(10 * 2**30)
ECHO = "the same bytes, echoed"
NEW_TEXTS = 32  # of a request of texts that nobody has sent before
BATCHES = 8  # of them, in each round
QUERIES = 40  # of one text each, in each round


@dataclass(frozen=True)
class CachePlan:
    """How much is sent, and for how long."""

    rounds: int
    seconds: float
    """Of each side in each round."""
    connections: int
    batch: int
    wide: int


@contextmanager
def server(folder: Path, models: Sequence[Path], *, cached: bool, serve: Sequence[str]) -> Iterator[RunningServer]:
    """vecmill with a cache of its own, or without one."""
    port = free_port()
    command = vecmill_command(port, "--embed-model", ",".join(map(str, models)), *SERVE, *serve)
    state = {"STATE_DIR": str(folder), "CACHE_MAX_BYTES": GIGABYTES_10 if cached else "0"}
    with running(command, port, "/ready", state) as started:
        yield started


def body(texts: Sequence[str], model: str) -> bytes:
    """A request for the texts' vectors as base64."""
    return json.dumps({"model": model, "input": list(texts), "encoding_format": "base64"}).encode()


def measure_hits(
    folder: Path, texts: Sequence[str], plan: CachePlan, serve: Sequence[str], advance: Callable[[int], None]
) -> dict[str, list[float]]:
    """Texts per second by the width of their vectors, each round's; beside a server that gives back stored bytes."""
    bundled = bundled_model()
    wide = write_wide_model(folder / f"wide-{plan.wide}", plan.wide, bundled)
    with ExitStack() as stack:
        vecmill = stack.enter_context(server(folder / "state", [bundled, wide], cached=True, serve=serve))
        sides: dict[str, tuple[str, list[bytes]]] = {}
        for model, width in ((bundled.name, 384), (wide.name, plan.wide)):
            bodies = [body(texts[at : at + plan.batch], model) for at in range(0, len(texts), plan.batch)]
            answer = _fill(vecmill.url, bodies)
            sides[str(width)] = vecmill.url, bodies
            sides[f"{width}, {ECHO}"] = stack.enter_context(echo_server(answer)), bodies
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for name in in_turns(list(sides), plan.rounds):
            url, bodies = sides[name]
            rates[name].append(plan.batch * _requests_per_second(url, bodies, plan))
            advance(1)
    return rates


def _fill(url: str, bodies: Sequence[bytes]) -> bytes:
    """Send each body twice. Returns the last answer; raises RuntimeError if one of its texts was computed again."""
    connection = TimedConnection(url)
    for body in bodies:
        connection.send("POST", PATH, body, HEADERS)
    answers = [connection.send("POST", PATH, body, HEADERS) for body in bodies]
    answer = answers[-1]
    count = len(json.loads(bodies[-1])["input"])
    if answer.headers.get("x-cached-inputs") != str(count):
        raise RuntimeError("the second answer was computed again: the cache does not work")
    connection.close()
    return answer.content


def _requests_per_second(url: str, bodies: Sequence[bytes], plan: CachePlan) -> float:
    def send_for_a_while(first: int) -> int:
        connection, sent = TimedConnection(url), 0
        ended = time.perf_counter() + plan.seconds
        while time.perf_counter() < ended:
            connection.send("POST", PATH, bodies[(first + sent) % len(bodies)], HEADERS)
            sent += 1
        connection.close()
        return sent

    started = time.perf_counter()
    with ThreadPoolExecutor(plan.connections) as pool:
        starts = range(0, len(bodies), max(1, len(bodies) // plan.connections))
        sent = sum(pool.map(send_for_a_while, list(starts)[: plan.connections]))
    return sent / (time.perf_counter() - started)


def measure_misses(
    folder: Path, texts: Sequence[str], plan: CachePlan, serve: Sequence[str], advance: Callable[[int], None]
) -> dict[str, dict[str, list[float]]]:
    """Each round's median of requests whose texts are all new, sent to both servers in turns.

    `with` and `without` the cache in milliseconds, and `paid`: how much longer a request with it takes, in
    percent.
    """
    bundled, kinds = bundled_model(), {"with": True, "without": False}
    figures: dict[str, dict[str, list[float]]] = {
        size: {name: [] for name in (*kinds, "paid")} for size in ("batch", "query")
    }
    with ExitStack() as stack:
        urls = {
            kind: stack.enter_context(server(folder / kind, [bundled], cached=cached, serve=serve)).url
            for kind, cached in kinds.items()
        }
        for number in range(plan.rounds + 1):
            for size, parts in _new_texts(texts, number).items():
                taken = _milliseconds(urls, [body(part, "default") for part in parts])
                for name, figure in taken.items():
                    if number:  # the first round warms up
                        figures[size][name].append(figure)
            advance(1)
    return figures


def _new_texts(texts: Sequence[str], number: int) -> dict[str, list[list[str]]]:
    """New texts for one round, in requests, by size of the request."""
    new = [f"# {number}\n{text}" for text in texts[: BATCHES * NEW_TEXTS]]
    return {
        "batch": [new[at : at + NEW_TEXTS] for at in range(0, len(new), NEW_TEXTS)],
        "query": [[f"where is number {number} of {index} parsed"] for index in range(QUERIES)],
    }


def _milliseconds(urls: Mapping[str, str], bodies: Sequence[bytes]) -> dict[str, float]:
    """The median of each side. Each body goes to both sides, and the side that comes first alternates."""
    connections = {kind: TimedConnection(url) for kind, url in urls.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in urls}
    for number, body in enumerate(bodies):
        for kind in list(urls)[:: 1 if number % 2 == 0 else -1]:
            taken[kind].append(connections[kind].send("POST", PATH, body, HEADERS).milliseconds)
    for connection in connections.values():
        connection.close()
    pairs = zip(taken["with"], taken["without"], strict=True)
    paid = [100 * (with_cache / without_cache - 1) for with_cache, without_cache in pairs]
    return {name: statistics.median(values) for name, values in {**taken, "paid": paid}.items()}
