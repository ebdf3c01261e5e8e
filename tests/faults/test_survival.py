"""One server, to which things are done while clients use it.

Each time: what is answered is right, what is not answered has failed visibly, `/health` has told the truth, and the
server is whole again by itself within `BACK_WITHIN` seconds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import sleep, time

import httpx
import numpy as np
import pytest

from tests.faults.batch_lines import TOLERANCE
from tests.faults.harmed_server import POISON
from tests.faults.service import Service, service, until
from vecmill.serve.open_files import RESERVED_FILES

BACK_WITHIN = 10.0  # seconds; a cache that has failed is tried again after 5
CLIENTS = 8
SETTINGS = {"CACHE_MAX_BYTES": "100000000", "JOB_LEASE_SECONDS": "15", "MAX_FILES_BYTES": "100000000"}
MANY = "lorem ipsum dolor sit amet " * 20


class Harmed:
    """The server, the pipe by which it is harmed, and what it answers when it is well."""

    def __init__(self, server: Service, pipe: Path) -> None:
        self.server = server
        self._pipe = pipe
        self._number = 0

    def harm(self, line: str) -> None:
        """As `tests.faults.harmed_server` says."""
        with self._pipe.open("w") as pipe:
            pipe.write(line + "\n")

    def fresh(self, count: int, text: str = "") -> list[str]:
        """Texts that were never sent: no cache answers for the device."""
        self._number += count
        return [f"{number} {text}" for number in range(self._number - count, self._number)]

    def ask(self, texts: Sequence[str]) -> tuple[int, Sequence[Sequence[float]]]:
        """The status of an answer, and its vectors; 0: the connection broke."""
        body = {"model": "m", "input": list(texts), "encoding_format": "float"}
        try:
            answer = httpx.post(f"{self.server.url}/v1/embeddings", json=body, timeout=30)
        except httpx.TransportError:
            return 0, []
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
            return answer.status_code, []
        return 200, [item["embedding"] for item in answer.json()["data"]]

    def under_load(self, requests: Sequence[Sequence[str]]) -> Counter[int]:
        """How many requests, several at a time, had which status. What was answered is what the text alone gives."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(self.ask, requests))
        self.harm("passes 0")
        self.whole()
        for texts, (status, vectors) in zip(requests, answers, strict=True):
            if status == 200:
                alone = self.ask(texts[:1])[1]
                np.testing.assert_allclose(vectors[0], alone[0], rtol=0, atol=TOLERANCE)
                assert len(vectors) == len(texts)
        return Counter(status for status, _ in answers)

    def whole(self) -> None:
        """Wait until searches, large requests, jobs, files and the cache work, and `/health` says so."""

        def look() -> bool:
            health = self.server.http.get("/health").json()
            healthy = health["status"] == "ok" and all(
                health[name]["ok"] for name in ("state", "cache", "jobs", "batches")
            )
            return healthy and self.ask(self.fresh(1))[0] == 200 and self.ask(self.fresh(64, MANY))[0] == 200

        until(look, BACK_WITHIN)
        written = self.server.get("/cache")["written"]
        assert self.ask(self.fresh(1))[0] == 200
        until(lambda: self.server.get("/cache")["written"] > written, BACK_WITHIN)
        job = self.server.post("/jobs", {"project": "p", "total_chunks": 1, "instance_id": "i"})["job_id"]
        self.server.post(f"/jobs/{job}/complete")
        until(lambda: upload(self.server) == 200, BACK_WITHIN)


def upload(server: Service) -> int:
    """The status of a file's upload."""
    sent = {"file": ("input.jsonl", b"{}")}
    return server.http.post("/v1/files", data={"purpose": "batch"}, files=sent).status_code


@pytest.fixture(scope="module")
def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harmed]:
    folder = tmp_path_factory.mktemp("harmed")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    serve = ("-m", "tests.faults.harmed_server", str(pipe))
    with service(tiny_model, folder / "state", folder / "log", SETTINGS, serve=serve) as server:
        yield Harmed(server, pipe)


@pytest.fixture
def harmed(running: Harmed) -> Harmed:
    """Started anew where it has ended, as a supervisor does."""
    if not running.server.runs():
        running.server.start()
    return running


@pytest.mark.parametrize(
    ("share", "requests"), [(0.2, 100), pytest.param(0.01, 3000, marks=[pytest.mark.nightly, pytest.mark.timeout(600)])]
)
def test_passes_that_raise_fail_alone(harmed: Harmed, share: float, requests: int) -> None:
    harmed.harm(f"passes {share} 23")
    statuses = harmed.under_load([harmed.fresh(2) for _ in range(requests)])
    assert set(statuses) == {200, 503}
    assert statuses[503] < requests // 2
    assert harmed.server.runs()


THREADS = ("small-worker", "worker", "pack", "cache-writer", "jobs", "asyncio", "batch-disk", "brief-reads")


@pytest.mark.parametrize(
    "names", [" ".join(THREADS), *(pytest.param(name, marks=pytest.mark.nightly) for name in THREADS)]
)
def test_threads_that_end_are_replaced(harmed: Harmed, names: str) -> None:
    requests = [harmed.fresh(1 + 40 * (number % 2), MANY) for number in range(24)]
    harmed.harm(f"end {names}")
    assert set(harmed.under_load(requests)) <= {200, 503}


def test_a_panic_fails_its_request_alone(harmed: Harmed) -> None:
    requests = [[*harmed.fresh(1), POISON] if number % 4 == 0 else harmed.fresh(2) for number in range(16)]
    assert harmed.under_load(requests) == {200: 12, 500: 4}


@contextmanager
def limited(server: Service, which: int, value: int) -> Iterator[None]:
    """A running process with less than it had."""
    before = resource.prlimit(server.pid, which)
    resource.prlimit(server.pid, which, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, which, before)


def connect(server: Service) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_connections_leave_descriptors_to_everything_else(harmed: Harmed) -> None:
    server = harmed.server
    harmed.whole()
    held = len(os.listdir(f"/proc/{server.pid}/fd"))
    with limited(server, resource.RLIMIT_NOFILE, held + RESERVED_FILES + 8), ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(60)]
        answers: Counter[bytes] = Counter()
        for client in clients:
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answers[client.recv(4096)[9:12]] += 1
        assert answers[b"200"] >= 4
        assert answers[b"200"] + answers[b"429"] == 60
        before = cpu_seconds(server)
        sleep(0.3)
        assert cpu_seconds(server) - before < 0.2
        # On a connection that was there before.
        assert server.get("/health")["status"] == "ok"
        assert server.http.post("/embed", json={"inputs": harmed.fresh(2)}).is_success
        assert upload(server) == 200
    harmed.whole()


def cpu_seconds(server: Service) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_state_folder_that_is_removed_is_made_again(harmed: Harmed) -> None:
    server = harmed.server
    harmed.whole()
    job = server.post("/jobs", {"project": "kept", "total_chunks": 8, "instance_id": "i"})["job_id"]
    shutil.rmtree(server.state, ignore_errors=True)  # something may be written meanwhile, so that the folder stays
    assert set(harmed.under_load([harmed.fresh(2) for _ in range(8)])) == {200}
    assert server.post(f"/jobs/{job}/progress", {"current": 3})["current"] == 3
    server.kill()
    server.start()
    assert server.get(f"/jobs/{job}")["current"] == 3
    assert server.post(f"/jobs/{job}/complete")["status"] == "completed"


def test_clients_that_vanish_leave_nothing_behind(harmed: Harmed) -> None:
    """In mid-head, in mid-body, before the answer and in the midst of it; with and without a reset."""
    server = harmed.server
    harmed.whole()
    before = len(os.listdir(f"/proc/{server.pid}/fd"))
    body = json.dumps({"model": "m", "input": harmed.fresh(200)}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for number, cut in enumerate((40, len(request) - 10, len(request), len(request)) * 4):
        with connect(server) as client:
            client.sendall(request[:cut])
            if number % 4 == 3:
                client.recv(100)
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    harmed.whole()
    until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= before + 4, BACK_WITHIN)


@pytest.mark.nightly
@pytest.mark.parametrize("seconds", [20.0, 70.0])
def test_a_stopped_process_goes_on(harmed: Harmed, seconds: float) -> None:
    """As by SIGSTOP, a debugger or a frozen container: no job is lost whose client could not report."""
    server = harmed.server
    harmed.whole()
    job = server.post("/jobs", {"project": "kept", "total_chunks": 8, "instance_id": "i"})["job_id"]
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(harmed.ask, harmed.fresh(40)) for _ in range(4)]
        sleep(0.02)
        server.signal(signal.SIGSTOP)
        try:
            stopped = time()
            asked += [pool.submit(harmed.ask, harmed.fresh(2)) for _ in range(2)]
            sleep(min(seconds, 25.0))  # clients' own patience is 30
            sleep(max(0.0, stopped + seconds - time()) if seconds > 25 else 0.0)
        finally:
            server.signal(signal.SIGCONT)
        assert {one.result()[0] for one in asked} <= {200, 0, 504}
    assert server.post(f"/jobs/{job}/progress", {"current": 3})["status"] == "active"
    assert server.post(f"/jobs/{job}/complete")["status"] == "completed"
    harmed.whole()


def test_memory_that_ends_fails_what_needs_it(harmed: Harmed) -> None:
    """Refused, never as a fault of the server. A process that the lack of memory has ended is started again."""
    server = harmed.server
    harmed.whole()
    size = int(Path(f"/proc/{server.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(server, resource.RLIMIT_AS, size + 2_000_000), ThreadPoolExecutor(CLIENTS) as pool:
        statuses = Counter(one[0] for one in pool.map(harmed.ask, [harmed.fresh(64, MANY * 10) for _ in range(16)]))
    assert set(statuses) <= {0, 200, 400, 503}
    if not server.runs():
        server.start()
    harmed.whole()


@pytest.mark.nightly
def test_a_device_thread_that_ends_ends_the_process(harmed: Harmed) -> None:
    server = harmed.server
    harmed.whole()
    harmed.harm("end engine")
    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = {one[0] for one in pool.map(harmed.ask, [harmed.fresh(40) for _ in range(8)])}
    assert statuses <= {200, 503, 0}
    assert server.ended_with() == 1
    assert "the device has failed" in server.log()
    server.start()
    harmed.whole()
