"""What a request takes of the parts that are not GPUs: seconds of a core of Redis, HAProxy and tokenizing.

By the processes' own CPU time, so that a machine that is busy otherwise gives about the same figures. The simulation
says from them what is full first.

    python -m benchmarks.cluster.shared_parts
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from benchmarks.lib.host import describe_host
from benchmarks.lib.minilm import bundled_model, sample_texts
from benchmarks.lib.results import publish
from benchmarks.lib.servers import free_port
from benchmarks.serving.echo import echo_server
from tokenizers import Tokenizer

from vecmill.storage.redis import RedisVectors

TOGETHER = 64  # texts of a request
DIMENSIONS = 1024  # Qwen3-Embedding-0.6B's
VECTOR_BYTES = 2 * DIMENSIONS + 25  # as the cache keeps it
BESIDE_PATH = ":/usr/sbin"

HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend all
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance leastconn
  http-reuse always
  server one {server}
"""


def cpu_of(process: psutil.Process) -> float:
    """Seconds of a core that it has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def started(command: list[str], port: int) -> Iterator[psutil.Process]:
    """A program that listens on a port, while the block runs."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _until_listening(port)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _until_listening(port: int) -> None:
    import socket

    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def redis_seconds(rounds: int) -> dict[str, float]:
    """Of redis-server for each vector that is put, and for each that is looked up, 64 at a time."""
    port = free_port()
    program = shutil.which("redis-server", path=os.environ["PATH"] + BESIDE_PATH)
    if program is None:
        raise SystemExit("redis-server is not installed: sudo apt install redis-server")
    with started([program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""], port) as process:
        store = RedisVectors(f"redis://127.0.0.1:{port}/0")
        keys = [[os.urandom(16) for _ in range(TOGETHER)] for _ in range(rounds)]
        content = os.urandom(VECTOR_BYTES)
        began = cpu_of(process)
        for some in keys:
            store.put(dict.fromkeys(some, content), ())
        put = cpu_of(process)
        for some in keys:
            assert len(store.get(some)) == TOGETHER
        looked_up = cpu_of(process)
        store.close()
    vectors = rounds * TOGETHER
    return {"redis_put_s": (put - began) / vectors, "redis_look_up_s": (looked_up - put) / vectors}


def proxy_seconds(requests: int) -> dict[str, float]:
    """Of HAProxy for a request of bulk (64 texts, their vectors in base64) and for a search."""
    program = shutil.which("haproxy", path=os.environ["PATH"] + BESIDE_PATH)
    if program is None:
        raise SystemExit("haproxy is not installed: sudo apt install haproxy")
    vector = b64encode(bytes(4 * DIMENSIONS)).decode()
    text = "x" * 350
    found = {}
    for name, texts in (("proxy_bulk_s", TOGETHER), ("proxy_search_s", 1)):
        answer = json.dumps({"data": [{"embedding": vector} for _ in range(texts)]}).encode()
        body = json.dumps({"input": [text] * texts if texts > 1 else "a query"}).encode()
        with echo_server(answer) as url, tempfile.TemporaryDirectory() as folder:
            port = free_port()
            path = Path(folder, "haproxy.cfg")
            path.write_text(HAPROXY.format(port=port, server=url.removeprefix("http://")))
            with started([program, "-f", str(path)], port) as process, httpx.Client() as client:
                address = f"http://127.0.0.1:{port}/v1/embeddings"
                client.post(address, content=body).raise_for_status()
                began = _with_children(process)
                for _ in range(requests):
                    client.post(address, content=body)
                found[name] = (_with_children(process) - began) / requests
    return found


def _with_children(process: psutil.Process) -> float:
    return sum(map(cpu_of, (process, *process.children(recursive=True))))


def tokenizing_seconds(texts: int) -> dict[str, float]:
    """Of a core for each token, with the bundled model's tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    sample = sample_texts(texts)
    began = time.process_time()
    tokens = sum(len(tokenizer.encode(text).ids) for text in sample)
    return {"tokenize_s_per_token": (time.process_time() - began) / tokens}


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="of 64 vectors in Redis (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="through HAProxy (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2000, help="to tokenize (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args()
    seconds: dict[str, Any] = {
        **redis_seconds(options.rounds),
        **proxy_seconds(options.requests),
        **tokenizing_seconds(options.texts),
    }
    for name, value in seconds.items():
        print(f"{name}: {value * 1e6:.2f} us of a core", file=sys.stderr)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    publish(
        "shared_parts", {"host": describe_host(), "settings": settings, "seconds": seconds}, store=not options.no_store
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
