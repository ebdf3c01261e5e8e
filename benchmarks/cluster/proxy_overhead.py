"""What HAProxy and nginx add to a request, on the configurations that `vecmill proxy-config` writes.

Behind them stands a server that gives a stored answer as long as the request, so that nothing else takes time. The
same requests go to it directly and through each proxy, by turns: bodies of 10 kB, 1 MB and 10 MB, on 1 and on 64
connections, each of which sends its next request when it has the answer. HAProxy and nginx are those on the PATH.

    python -m benchmarks.cluster.proxy_overhead
    python -m benchmarks.cluster.proxy_overhead --rounds 1 --requests 50 --connections 1 --sizes 10000

Client, proxy and server share the machine's cores: with 64 connections the figures are those of a full machine.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from benchmarks.lib.figures import in_turns, print_disturbance, rounded, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.results import progress, publish
from benchmarks.lib.servers import free_port
from benchmarks.serving.echo import echo_server
from rich.console import Console
from rich.table import Table

KINDS = ("haproxy", "nginx")
DIRECT = "direct"
PATH = "/v1/embeddings"
READY_SECONDS = 10.0
BESIDE_PATH = ":/usr/sbin"
LARGEST = 64_000_000  # bytes of an answer in one read


@contextmanager
def proxied(kind: str, servers: Sequence[str]) -> Iterator[str]:
    """A proxy before the servers; its address while the block runs."""
    program = shutil.which(kind, path=os.environ["PATH"] + BESIDE_PATH)
    if program is None:
        raise SystemExit(f"{kind} is not installed: sudo apt install {kind}")
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        command = [sys.executable, "-m", "vecmill", "proxy-config", kind, "--listen", address]
        command += [word for server in servers for word in ("--replica", server)]
        command += ["--max-body-bytes", str(LARGEST), "--run-as", "none"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (folder / kind).write_text(text)
        if kind == "haproxy":
            words = [program, "-f", str(folder / kind)]
        else:
            directives = f"daemon off; pid {folder}/pid; error_log stderr error;"
            words = [program, "-p", f"{folder}/", "-c", str(folder / kind), "-g", directives]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_until_ready(f"http://{address}/ready")
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=READY_SECONDS).is_success:
                return
        time.sleep(0.1)
    raise SystemExit(f"{url} did not answer within {READY_SECONDS:.0f} s")


async def load(url: str, body: bytes, connections: int, requests: int) -> list[float]:
    """Milliseconds from the first byte sent to the last one read, of so many requests in all."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nX-Priority: interactive\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    left = iter(range(requests))
    found: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, port, limit=LARGEST)
        try:
            for _ in left:
                began = time.perf_counter()
                writer.write(request)
                answer = await reader.readuntil(b"\r\n\r\n")
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(answer[:200].decode(errors="replace"))
                (length,) = [line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(length.partition(b":")[2]))
                found.append(1000 * (time.perf_counter() - began))
        finally:
            writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return found


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """The figures by case and side, and the cores that others took meanwhile."""
    cases: dict[str, Any] = {}
    sides = (DIRECT, *KINDS)
    total = len(options.sizes) * len(options.connections) * options.rounds * len(sides)
    with watched() as contention, progress("rounds", total) as advance:
        for size in options.sizes:
            body = b"x" * size
            with ExitStack() as stack:
                server = stack.enter_context(echo_server(body))
                urls = {DIRECT: server, **{kind: stack.enter_context(proxied(kind, [server])) for kind in KINDS}}
                for connections in options.connections:
                    requests = max(connections, round(options.requests * min(1, 100_000 / size)))
                    cases[f"{size} bytes, {connections} connections"] = _case(
                        urls, body, connections, requests, options.rounds, advance
                    )
    return cases, contention.other_cores


def _case(
    urls: Mapping[str, str], body: bytes, connections: int, requests: int, rounds: int, advance: Any
) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {side: {"p50": [], "p99": []} for side in urls}
    for side in urls:
        asyncio.run(load(urls[side], body, connections, connections))
    for side in in_turns(list(urls), rounds):
        times = sorted(asyncio.run(load(urls[side], body, connections, requests)))
        found[side]["p50"].append(statistics.median(times))
        found[side]["p99"].append(times[min(len(times) - 1, int(0.99 * len(times)))])
        advance(1)
    result: dict[str, Any] = {"requests": requests, "ms": {}, "added_ms": {}}
    for side, parts in found.items():
        result["ms"][side] = {part: spread(values) for part, values in parts.items()}
        if side != DIRECT:
            result["added_ms"][side] = {
                part: spread([through - alone for through, alone in zip(values, found[DIRECT][part], strict=True)])
                for part, values in parts.items()
            }
    return result


def print_summary(cases: Mapping[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    table = Table(title="ms: median over rounds; added: to the same round's direct", title_justify="left")
    for heading in ("body, connections", "direct p50", "p99", *(f"{kind} adds: p50, p99" for kind in KINDS)):
        table.add_column(heading, justify="left" if heading.startswith("body") else "right", no_wrap=True)
    for name, case in cases.items():
        direct = case["ms"][DIRECT]
        added = [case["added_ms"][kind] for kind in KINDS]
        table.add_row(
            name,
            *(rounded(direct[part]["median"]) for part in ("p50", "p99")),
            *(", ".join(rounded(each[part]["median"]) for part in ("p50", "p99")) for each in added),
        )
    console.print(table)
    print_disturbance(console, other_cores)


def numbers(value: str) -> Sequence[int]:
    """The numbers in a comma-separated list."""
    return [int(number) for number in value.split(",")]


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers, default=[10_000, 1_000_000, 10_000_000], help="bytes of a body")
    parser.add_argument("--connections", type=numbers, default=[1, 64], help="default: 1,64")
    parser.add_argument("--requests", type=int, default=4000, help="in a round; fewer where bodies are above 100 kB")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args()
    cases, other_cores = measure(options)
    print_summary(cases, other_cores)
    programs = {kind: _version(kind) for kind in KINDS}
    settings = {key: getattr(options, key) for key in ("sizes", "connections", "requests", "rounds")}
    result = {"host": describe_host(), "programs": programs, "settings": settings, "cases": cases}
    publish("proxy_overhead", {**result, "other_cores": round(other_cores, 3)}, store=not options.no_store)
    return 0


def _version(kind: str) -> str:
    program = shutil.which(kind, path=os.environ["PATH"] + BESIDE_PATH) or kind
    done = subprocess.run([program, "-v"], capture_output=True, text=True, check=True)
    return (done.stdout or done.stderr).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
