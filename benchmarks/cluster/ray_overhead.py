"""What Ray Serve adds to a request: through its proxy, into the front directly, and through HAProxy.

Requests whose vectors are cached, so that next to nothing is left but the way: bodies of 10 kB, 1 MB and 10 MB,
from 1, 64 and 512 connections, to a server alone and, in the same run, to one replica
behind each of Ray's ways. Combinations with more than 256 MB on the way are left out: a server admits no more.
Then a file that is larger than a request may be is sent through each and fetched again.

    python -m benchmarks.cluster.ray_overhead --store
    python -m benchmarks.cluster.ray_overhead --ways alone,proxy --seconds 2

It runs alone: Ray's direct ways have ports and files that are one machine's.
"""

import argparse
import asyncio
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import orjson
from benchmarks.lib.host import describe_host
from benchmarks.lib.results import keep_so_far, publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from rich.console import Console
from rich.table import Table
from tests.cluster.ray_cluster import ray_cluster

SIZES = {"10 kB": 10_000, "1 MB": 1_000_000, "10 MB": 10_000_000}
CONNECTIONS = (1, 64, 512)
MOST_ON_THE_WAY = 256_000_000  # bytes
FEWEST = 8  # requests of a combination, however long they take
FILE_BYTES = 40_000_000
SETTINGS = {"EMBED_MODEL": "all-MiniLM-L6-v2", "RERANK_MODEL": "none", "LOG_REQUESTS": "false"}
DIRECT_PORT = 30_000


def environment(way: str, folder: Path) -> dict[str, str]:
    """Ray's switches for a way."""
    if way == "proxy":
        return {}
    direct = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"}
    if way == "direct ingress":
        return direct
    return {
        **direct,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


WAYS = ("alone", "proxy", "direct ingress", "haproxy")


@contextmanager
def serving(way: str) -> Iterator[str]:
    """The URL of a way."""
    with TemporaryDirectory(prefix="v") as name:
        folder = Path(name)
        if way == "alone":
            own = free_port()
            settings = {**SETTINGS, "DEVICE": "cpu", "STATE_DIR": str(folder / "state"), "MAX_BATCH_TOKENS": "256"}
            with running(vecmill_command(own), own, "/ready", settings) as server:
                yield server.url
            return
        port = DIRECT_PORT if way == "direct ingress" else None
        with ray_cluster(folder, {"replicas": 1}, {**SETTINGS, **environment(way, folder)}, answering=port) as cluster:
            yield cluster.url


def body_of(size: int) -> bytes:
    """A request of so many bytes: a short text whose vector is cached, and a field that nobody reads."""
    empty = orjson.dumps({"model": "all-MiniLM-L6-v2", "input": "a short text", "note": ""})
    return empty[:-2] + b"x" * (size - len(empty)) + empty[-2:]


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
    """A request and its answer, on an open connection."""
    writer.write(head)
    writer.write(body)
    await writer.drain()
    status = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in status.partition(b"\r\n")[0]:
        raise RuntimeError(status[:300].decode("utf-8", "replace"))
    fields = dict(line.lower().split(b": ", 1) for line in status.split(b"\r\n")[1:] if line)
    if b"content-length" in fields:
        await reader.readexactly(int(fields[b"content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
    await reader.readuntil(b"\r\n")


async def times(url: str, body: bytes, connections: int, seconds: float) -> list[float]:
    """Milliseconds of each request, of so many connections at once."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    found: list[float] = []
    until = time.perf_counter() + seconds

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
        sent = 0
        while time.perf_counter() < until or sent < max(1, FEWEST // connections):
            began = time.perf_counter()
            await one(reader, writer, head, body)
            found.append(1000 * (time.perf_counter() - began))
            sent += 1
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    return found


def measure(url: str, seconds: float) -> dict[str, Any]:
    """Every combination of one way."""
    found: dict[str, Any] = {}
    for name, size in SIZES.items():
        body = body_of(size)
        asyncio.run(times(url, body, 1, 0))  # from now on its vectors are cached
        for connections in CONNECTIONS:
            if connections * size > MOST_ON_THE_WAY:
                continue
            try:
                each = asyncio.run(times(url, body, connections, seconds))
            except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
                found[f"{name}, {connections}"] = {"failed": str(error)[:200]}
                continue
            p50, p99 = (round(float(np.percentile(each, rank)), 2) for rank in (50, 99))
            found[f"{name}, {connections}"] = {
                "p50_ms": p50,
                "p99_ms": p99,
                "requests": len(each),
                "requests_per_s": round(len(each) / max(seconds, sum(each) / connections / 1000), 1),
            }
    return found


def streams(url: str) -> dict[str, Any]:
    """A file there and back, and the first of the events before their stream ends."""
    line = b'{"custom_id": "%d", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}\n'
    content = b"".join(line % number for number in range(FILE_BYTES // len(line)))
    began = time.perf_counter()
    sent = httpx.post(f"{url}/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"}, timeout=300)
    up = time.perf_counter() - began
    began = time.perf_counter()
    fetched = httpx.get(f"{url}/v1/files/{sent.json()['id']}/content", timeout=300).content
    down = time.perf_counter() - began
    with httpx.stream("GET", f"{url}/jobs/events", timeout=60) as events:
        first = next(events.iter_bytes())
    return {
        "file_bytes": len(content),
        "up_mb_per_s": round(len(content) / up / 1e6, 1),
        "down_mb_per_s": round(len(content) / down / 1e6, 1),
        "equal": hashlib.sha256(fetched).digest() == hashlib.sha256(content).digest(),
        "events_come": bool(first),
    }


def show(ways: Mapping[str, dict[str, Any]]) -> None:
    """For people."""
    table = Table(title="p50 / p99 ms")
    for column in ("body, connections", *ways):
        table.add_column(column)
    for row in next(iter(ways.values()))["requests"]:
        cells = [way["requests"].get(row, {}) for way in ways.values()]
        table.add_row(
            row, *(f"{cell['p50_ms']} / {cell['p99_ms']}" if "p50_ms" in cell else "failed" for cell in cells)
        )
    Console(stderr=True).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each combination")
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for way in options.ways.split(","):
        try:
            with serving(way) as url:
                found[way] = {"streams": streams(url), "requests": measure(url, options.seconds)}
        except (AssertionError, httpx.HTTPError, RuntimeError, OSError) as error:
            found[way] = {"failed": str(error)[-300:], "requests": {}}
        keep_so_far("ray_overhead", found)
    show(found)
    result = {"host": describe_host(), "settings": {"seconds": options.seconds}, "ways": found}
    publish("ray_overhead", result, store=options.store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
