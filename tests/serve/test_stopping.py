"""SIGTERM: what runs is answered, what comes is refused, batches go on later, and nothing holds up the end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.faults.service import Service, service, until
from tests.generation_server import DONE, GenerationServer, Moment, event, generation_server
from tests.held_server import held
from tests.in_process import InProcess
from tests.slow_loading_server import LOADING
from tests.tiny_checkpoints import tiny_bert
from vecmill.app import create_app
from vecmill.config import load_settings

LINES = 200
BATCH_LINES = [
    {"custom_id": str(n), "method": "POST", "url": "/v1/embeddings", "body": {"input": f"line {n}"}}
    for n in range(LINES)
]
BATCH_INPUT = "\n".join(map(json.dumps, BATCH_LINES)).encode()
MANY = 300
Work = tuple[str, dict[str, Any], tuple[str, ...]]


def work(name: str) -> list[Work]:
    """Requests of each kind that miss the cache, and where in an answer their clients find an error's message."""
    return [
        ("/v1/embeddings", {"input": [f"{name} one", f"{name} two"]}, ("error", "message")),
        ("/embed", {"inputs": [f"{name} {number}" for number in range(MANY)]}, ("error",)),
        ("/v2/embed", {"texts": [f"{name} three"], "input_type": "search_document"}, ("message",)),
        ("/v1/rerank", {"query": f"{name} q", "documents": [f"{name} a", f"{name} b"]}, ("error", "message")),
        ("/rerank", {"query": f"{name} r", "texts": [f"{name} c", f"{name} d"]}, ("error",)),
        ("/api/embed", {"model": "m", "input": f"{name} four"}, ("error",)),
    ]


KINDS = len(work(""))
TEXTS = MANY + 10  # of the other kinds: 2 + 1 + 3 + 3 + 1
LATE: list[Work] = [
    *work("late"),
    ("/v1/chat/completions", {"model": "m", "messages": []}, ("error", "message")),
    ("/tokenize", {"inputs": "x"}, ("error",)),
    ("/jobs", {"project": "p", "total_chunks": 1}, ("detail",)),
    ("/v1/files", {}, ("error", "message")),
    (
        "/v1/batches",
        {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": "24h"},
        ("error", "message"),
    ),
]


@dataclass
class Streaming:
    """A generation server that waits between two events."""

    server: GenerationServer
    go_on: Moment

    async def generate(self, request: Request) -> Response:
        async def events() -> Any:
            yield event("begun")
            await self.go_on.wait()
            yield event("ended")
            yield DONE

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def generation() -> Iterator[Streaming]:
    with generation_server() as server:
        streaming = Streaming(server, Moment())
        server.generate = streaming.generate
        yield streaming


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "lock"
    path.touch()
    return path


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path, gate: Path, generation: Streaming
) -> Iterator[Service]:
    """A service on one state folder; each test starts it and ends it."""
    folder = tmp_path_factory.mktemp("stopping")
    settings = {
        "BATCH_CHUNK_SIZE": "16",
        "CACHE_MAX_BYTES": "100000000",
        "GENERATION_URL": generation.server.url,
        "MAX_BATCH_SIZE": "8",
        "SHUTDOWN_SECONDS": "60",
    }
    tiny = tiny_bert(folder / "tiny", minilm_folder)
    held_server = ("-m", "tests.held_server", str(gate))
    with service(tiny, folder / "state", folder / "log", settings, serve=held_server) as server:
        yield server


def stop(server: Service, says: str = "stopping: ") -> None:
    """Send SIGTERM and wait until it is seen."""
    seen = server.log().count(says)
    server.signal(signal.SIGTERM)
    until(lambda: server.log().count(says) > seen)


def ask(server: Service, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def ask_all(server: Service, pool: ThreadPoolExecutor, name: str) -> list[Future[httpx.Response]]:
    """Send work of every kind, and wait until all of it is in progress."""
    answers = [pool.submit(ask, server, path, body) for path, body, _ in work(name)]
    until(lambda: server.get("/models")["data"][0]["stats"]["results_pending"] >= KINDS)
    return answers


def words(answer: httpx.Response, where: tuple[str, ...]) -> str:
    """The message of a 503 that asks to try again, from its place in the dialect."""
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    value = answer.json()
    for key in where:
        value = value[key]
    assert isinstance(value, str)
    assert "try again" in value
    return value


class RawUpload:
    """A POST /v1/files over a socket of which only half is sent."""

    def __init__(self, server: Service) -> None:
        parts = ('name="purpose"\r\n\r\nbatch', 'name="file"; filename="a"\r\n\r\n' + "x" * 1000)
        body = "".join(f"--b\r\nContent-Disposition: form-data; {part}\r\n" for part in parts) + "--b--\r\n"
        head = (
            "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        )
        self._socket = connected(server)
        self._socket.sendall(head.encode())
        assert self._socket.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"  # it waits for the body
        self._socket.sendall(body[:500].encode())
        self._rest = body[500:].encode()

    def finish(self) -> bytes:
        self._socket.sendall(self._rest)
        return self.answer()

    def answer(self) -> bytes:
        """All that comes until the server closes."""
        with self._socket:
            return b"".join(iter(lambda: self._socket.recv(65536), b""))


def connected(server: Service, receive_buffer: int | None = None) -> socket.socket:
    """A connection of its own."""
    raw = socket.socket()
    raw.settimeout(60)
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    return raw


def begun_stream(server: Service, pool: ThreadPoolExecutor, method: str, path: str, body: Any = None) -> Future[bytes]:
    """Read a stream to its end in the background; it has begun."""
    begun = threading.Event()

    def read() -> bytes:
        with httpx.stream(method, server.url + path, json=body, timeout=60) as answer:
            received = b""
            for chunk in answer.iter_raw():
                received += chunk
                begun.set()
            return received

    reading = pool.submit(read)
    assert begun.wait(60)
    return reading


def test_what_runs_is_answered_what_comes_is_refused_and_a_batch_goes_on_later(
    stopped: Service, gate: Path, generation: Streaming
) -> None:
    stopped.start()
    job = stopped.post("/jobs", {"project": "p", "total_chunks": 10})["job_id"]
    with ThreadPoolExecutor(KINDS + 2) as pool:
        with held(gate):
            answers = ask_all(stopped, pool, "first")
            chat = {"model": "m", "messages": [], "stream": True}
            generated = begun_stream(stopped, pool, "POST", "/v1/chat/completions", chat)
            followed = begun_stream(stopped, pool, "GET", "/jobs/events")
            file = httpx.post(
                f"{stopped.url}/v1/files", data={"purpose": "batch"}, files={"file": ("input.jsonl", BATCH_INPUT)}
            )
            batch_fields = {
                "input_file_id": file.json()["id"],
                "endpoint": "/v1/embeddings",
                "completion_window": "24h",
            }
            batch = stopped.post("/v1/batches", batch_fields)["id"]
            until(lambda: "batch begins" in stopped.log())
            upload = RawUpload(stopped)
            stop(stopped)

            assert httpx.get(f"{stopped.url}/ready").status_code == 503
            health = httpx.get(f"{stopped.url}/health")
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            assert health.headers["connection"] == "close"
            for path, body, where in LATE:
                assert "shutting down" in words(ask(stopped, path, body), where)
            reported = httpx.post(f"{stopped.url}/jobs/{job}/progress", json={"current": 5})
            assert (reported.status_code, reported.json()["current"]) == (200, 5)
            assert b"event: job" in followed.result(60)
            assert b'"object":"file"' in upload.finish()
            assert not any(answer.done() for answer in answers)
        for answer in answers:
            assert answer.result(60).status_code == 200, answer.result().url
        assert len(answers[1].result().json()) == MANY
        # The stream still goes on, so the server answers what it has done.
        until(lambda: stopped.get("/stats")["queue_depth"] == 0)
        until(lambda: not stopped.get("/stats")["gpu_busy"])
        computed = stopped.get("/stats")["texts_computed"]
        generation.go_on.happen()
        assert generated.result(60).endswith(DONE)
    assert stopped.ended_with() == 0
    assert "all answered" in stopped.log()
    assert "Traceback" not in stopped.log()

    assert computed < LINES + TEXTS, "nothing of the batch is left to be done"
    stopped.start()
    until(lambda: stopped.get(f"/v1/batches/{batch}")["status"] == "completed")
    assert stopped.get(f"/v1/batches/{batch}")["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    assert computed + stopped.get("/stats")["texts_computed"] == LINES + TEXTS
    began = time.monotonic()
    stop(stopped)  # `stopped.http` keeps a connection open
    assert stopped.ended_with() == 0
    assert time.monotonic() - began < 10


def test_no_one_holds_up_the_end(stopped: Service, gate: Path) -> None:
    """A device that does not answer, a client that does not read, one that does not send."""
    stopped.set(SHUTDOWN_SECONDS="1")
    stopped.start()
    large = stopped.http.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("large", b"x" * 32_000_000)}
    ).json()["id"]
    with ThreadPoolExecutor(KINDS) as pool, held(gate), connected(stopped, 4096) as deaf:
        answers = ask_all(stopped, pool, "second")
        deaf.sendall(f"GET /v1/files/{large}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert deaf.recv(12) == b"HTTP/1.1 200"
        upload = RawUpload(stopped)
        began = time.monotonic()
        stop(stopped)
        for (_, _, where), answer in zip(LATE, answers, strict=False):
            assert "stopped before" in words(answer.result(60), where)
        assert upload.answer().startswith(b"HTTP/1.1 503")
        assert stopped.ended_with() == 0
        assert time.monotonic() - began < 1 + 5 + 2
    assert f"{KINDS + 2} requests were ended" in stopped.log()


def test_the_second_signal_ends_it_at_once(stopped: Service, gate: Path) -> None:
    stopped.set(SHUTDOWN_SECONDS="600")
    stopped.start()
    job = stopped.post("/jobs", {"project": "kept", "total_chunks": 10})["job_id"]
    with ThreadPoolExecutor(KINDS) as pool, held(gate):
        answers = ask_all(stopped, pool, "third")
        stop(stopped)
        assert not any(answer.done() for answer in answers)
        stopped.signal(signal.SIGINT)
        for (_, _, where), answer in zip(LATE, answers, strict=False):
            words(answer.result(60), where)
        assert stopped.ended_with() == 0
    stopped.launch()
    until(lambda: "listening on" in stopped.log().rpartition("stopped after")[2])
    listed = until(lambda: stopped.get("/jobs")["active"])
    assert job in [entry["id"] for entry in listed]
    stop(stopped)  # while it loads
    assert stopped.ended_with() == 0


@pytest.mark.parametrize("how", ["returns", pytest.param("raises", marks=pytest.mark.nightly)])
def test_a_stop_while_the_models_load_is_a_clean_end(tmp_path: Path, minilm_folder: Path, how: str) -> None:
    """Whatever becomes of the loading, once nobody waits for it any more."""
    tiny = tiny_bert(tmp_path / "tiny", minilm_folder)
    serve = ("-m", "tests.slow_loading_server", how)
    with service(tiny, tmp_path / "state", tmp_path / "log", serve=serve) as server:
        server.launch()
        until(lambda: loading(server).get("message") == LOADING)
        assert loading(server)["status"] == "loading"
        server.signal(signal.SIGTERM)
        assert server.ended_with() == 0
        assert "stopped after" in server.log()
        assert "Traceback" not in server.log()
        assert "Error" not in server.log()


def test_a_stop_while_torch_is_imported_is_a_clean_end(tmp_path: Path, minilm_folder: Path) -> None:
    with service(minilm_folder, tmp_path / "state", tmp_path / "log") as server:
        server.launch()
        until(lambda: loading(server).get("status") == "loading")
        server.signal(signal.SIGTERM)
        assert server.ended_with() == 0
        assert "Traceback" not in server.log()


def loading(server: Service) -> dict[str, Any]:
    try:
        health: dict[str, Any] = server.http.get("/health").json()
    except httpx.TransportError:
        return {}
    return health


async def test_every_route_refuses_work_or_is_known_to_bring_none() -> None:
    no_work = {
        "/api/show",
        "/progress",
        "/jobs/{job_id}/progress",
        "/jobs/{job_id}/complete",
        "/jobs/{job_id}/fail",
        "/jobs/{job_id}/cancel",
        "/v1/batches/{batch_id}/cancel",
        "/embed_sparse",
        "/embed_all",
        "/predict",
    }
    app = create_app(load_settings({"generation_url": "http://127.0.0.1:1"}))
    app.state.server.begin_to_stop()
    posts = {path for path, operations in app.openapi()["paths"].items() if "post" in operations}
    assert no_work < posts
    async with httpx.AsyncClient(transport=InProcess(app), base_url="http://localhost") as client:
        for path in sorted(posts - no_work):
            answer = await client.post(path.replace("{hosted_model}", "m"), json={})
            assert answer.status_code == 503, path
            assert "shutting down" in answer.text


def test_new_work_is_taken_until_the_drain_is_over(stopped: Service) -> None:
    stopped.set(SHUTDOWN_SECONDS="60", DRAIN_SECONDS="2")
    stopped.start()
    began = time.monotonic()
    stop(stopped)
    until(lambda: stopped.http.get("/ready").status_code == 503)
    assert stopped.http.get("/health").json()["status"] == "draining"
    for path, body, _ in work("drained"):
        assert stopped.http.post(path, json=body).status_code == 200
    assert stopped.http.get("/ready").headers.get("Connection") != "close"  # whoever balances keeps its connection
    assert stopped.ended_with() == 0
    assert 2 <= time.monotonic() - began < 20
    assert "all answered" in stopped.log()


@pytest.mark.nightly
def test_the_second_signal_ends_the_drain_too(stopped: Service) -> None:
    stopped.set(SHUTDOWN_SECONDS="60", DRAIN_SECONDS="50")
    stopped.start()
    began = time.monotonic()
    stop(stopped)
    until(lambda: stopped.http.get("/ready").status_code == 503)
    stopped.signal(signal.SIGTERM)
    assert stopped.ended_with() == 0
    assert time.monotonic() - began < 20
    stopped.set(DRAIN_SECONDS="0")
