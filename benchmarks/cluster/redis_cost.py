"""What Redis adds to a cache hit and to a job's progress, beside the same in files of this server alone.

Two servers of the bundled MiniLM, one with REDIS_URL and one without, are asked in turns by one client on one
connection: an embedding whose text both have in their caches, and a report of a job's progress. Stores: the same keys
looked up in Redis and in SQLite without a server around them, and a job's transaction.

    python -m benchmarks.cluster.redis_cost
    python -m benchmarks.cluster.redis_cost --calls 50 --no-store

Needs redis-server on the PATH. Redis is on this machine: over a network its round trips come on top, one for a hit and
two for a report.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from benchmarks.lib.figures import print_disturbance, significant
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import bundled_model, sample_texts
from benchmarks.lib.results import publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from benchmarks.lib.timed_http import TimedConnection
from rich.console import Console

from vecmill.cache.embedding_cache import KEY_BYTES
from vecmill.core.protocols import VectorStore
from vecmill.storage.redis import RedisVectors
from vecmill.storage.sqlite_vectors import SqliteVectors

SERVE = ("--rerank-model", "none", "--torch-compile", "false")
JSON = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
WITH, WITHOUT = "redis", "files"
WARM_UP = 20  # calls of each side that do not count
VALUE_BYTES = 816  # of a vector of 384 dimensions
CACHED_SECONDS = 30.0
Call = Callable[[], float]
"""Its time in milliseconds."""


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The address of a Redis that writes what it is told to disk every second, as its own documentation advises."""
    executable = shutil.which("redis-server")
    if executable is None:
        raise SystemExit("redis-server is not on the PATH: sudo apt install redis-server")
    port = free_port()
    command = [executable, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes"]
    with subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL) as process:
        try:
            store = RedisVectors(url := f"redis://127.0.0.1:{port}/0")
            for _ in range(100):
                try:
                    store.size()
                except Exception:
                    time.sleep(0.05)
            store.close()
            yield url
        finally:
            process.terminate()


def in_pairs(sides: Mapping[str, Call], calls: int) -> dict[str, Any]:
    """Each side's p50 and p99, and what Redis adds, call by call. Which side is asked first alternates."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(WARM_UP + calls):
        for name in names if number % 2 == 0 else names[::-1]:
            milliseconds = sides[name]()
            if number >= WARM_UP:
                taken[name].append(milliseconds)
    added = [with_redis - without for with_redis, without in zip(taken[WITH], taken[WITHOUT], strict=True)]
    return {
        **{name: percentiles(values) for name, values in taken.items()},
        "added_ms": {
            "p50": significant(percentiles(taken[WITH])["p50"] - percentiles(taken[WITHOUT])["p50"]),
            "p99": significant(percentiles(taken[WITH])["p99"] - percentiles(taken[WITHOUT])["p99"]),
            "median_of_pairs": significant(float(np.median(added))),
        },
        "calls": calls,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    p50, p99 = (significant(float(value)) for value in np.percentile(values, (50, 99)))
    return {"p50": p50, "p99": p99}


def hit(connection: TimedConnection, text: str) -> Call:
    """A request for the vector of a text that is in the cache, once it is there."""
    body = json.dumps({"model": "m", "input": text, "encoding_format": "base64"}).encode()

    def send() -> float:
        answer = connection.send("POST", "/v1/embeddings", body, JSON)
        if answer.headers.get("x-cached-inputs") != "1":
            raise RuntimeError("it was computed again")
        return answer.milliseconds

    connection.send("POST", "/v1/embeddings", body, JSON)
    deadline = time.monotonic() + CACHED_SECONDS
    while connection.send("POST", "/v1/embeddings", body, JSON).headers.get("x-cached-inputs") != "1":
        if time.monotonic() > deadline:
            raise RuntimeError("the text does not get into the cache")
        time.sleep(0.05)
    # What is on its way to the store is answered from memory: what is measured comes from the store.
    time.sleep(1)
    return send


def report(connection: TimedConnection, calls: int) -> Call:
    """A report of the progress of a job of this server."""
    total = WARM_UP + calls
    registration = json.dumps({"project": "p", "total_chunks": total, "instance_id": "i"}).encode()
    job = json.loads(connection.send("POST", "/jobs", registration, JSON).body())["job_id"]
    numbers = iter(range(1, total + 1))

    def send() -> float:
        body = json.dumps({"current": next(numbers)}).encode()
        return connection.send("POST", f"/jobs/{job}/progress", body, JSON).milliseconds

    return send


def measure_servers(folder: Path, redis_url: str, calls: int, serve: Sequence[str]) -> dict[str, Any]:
    """A hit and a report over HTTP."""
    with ExitStack() as stack:
        connections: dict[str, TimedConnection] = {}
        for name, extra in ((WITH, {"REDIS_URL": redis_url}), (WITHOUT, {})):
            port = free_port()
            command = vecmill_command(port, "--embed-model", str(bundled_model()), *SERVE, *serve)
            settings = {"STATE_DIR": str(folder / name), "CACHE_MAX_BYTES": str(2**30), **extra}
            connections[name] = TimedConnection(stack.enter_context(running(command, port, "/ready", settings)).url)
        text = sample_texts(1)[0]
        hits = in_pairs({name: hit(connection, text) for name, connection in connections.items()}, calls)
        reports = in_pairs({name: report(connection, calls) for name, connection in connections.items()}, calls)
        for connection in connections.values():
            connection.close()
    return {"hit": hits, "progress": reports}


def measure_stores(folder: Path, redis_url: str, entries: int, calls: int) -> dict[str, Any]:
    """One key and 64 keys looked up without a server around them."""
    generator = np.random.default_rng(0)
    keys = [generator.bytes(KEY_BYTES) for _ in range(entries)]
    stores: dict[str, VectorStore] = {
        WITH: RedisVectors(redis_url),
        WITHOUT: SqliteVectors(folder / "cache.db", 2**30),
    }
    for store in stores.values():
        for start in range(0, entries, 500):
            store.put({key: generator.bytes(VALUE_BYTES) for key in keys[start : start + 500]}, ())
    measured = {
        f"{count} keys": in_pairs({name: look_up(store, keys, count) for name, store in stores.items()}, calls)
        for count in (1, 64)
    }
    for store in stores.values():
        store.close()
    return measured


def look_up(store: VectorStore, keys: Sequence[bytes], count: int) -> Call:
    """So many keys at once, the same draws for every store."""
    draw = np.random.default_rng(1)

    def get() -> float:
        wanted = [keys[index] for index in draw.choice(len(keys), count, replace=False)]
        started = time.perf_counter()
        found = store.get(wanted)
        milliseconds = 1000 * (time.perf_counter() - started)
        if len(found) != count:
            raise RuntimeError("keys are missing")
        return milliseconds

    return get


def print_summary(results: Mapping[str, Any], other_cores: float) -> None:
    """One line for each kind of call."""
    console = Console(stderr=True)
    for name, figures in {**results["http"], **results["stores"]}.items():
        redis, files, added = figures[WITH], figures[WITHOUT], figures["added_ms"]
        console.print(
            f"{name}: with Redis p50 {redis['p50']:g} ms, p99 {redis['p99']:g}; with files {files['p50']:g}, "
            f"{files['p99']:g}; Redis adds {added['median_of_pairs']:g} ms to a pair's median",
            soft_wrap=True,
        )
    print_disturbance(console, other_cores)


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="of each kind to each side (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=100_000, help="of the stores (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    with watched() as contention, TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("redis", WITH, WITHOUT):
            (folder / name).mkdir(exist_ok=True)
        with redis_server(folder / "redis") as url:
            http = measure_servers(folder, url, options.calls, options.serve)
            stores = measure_stores(folder, url, options.entries, options.calls)
    results = {"http": http, "stores": stores}
    print_summary(results, contention.other_cores)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    result = {"host": describe_host(), "settings": settings, "other_cores": contention.other_cores, **results}
    publish("redis_cost", result, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
