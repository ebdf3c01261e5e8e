"""Bodies that do not come: each ends, none keeps others out, and a client that leaves is no fault."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.faults.service import Service, service, until
from tests.hostile.conftest import BODY_TIMEOUT, MAX_BODY_BYTES
from tests.hostile.wire import Wire, WireAnswer, answer_to, connected, request
from tests.tiny_checkpoints import tiny_bert

BODY = b'{"input":"x"}'
LARGE = b'{"inputs":"' + b"x" * (MAX_BODY_BYTES - 20) + b'"}'
EMBED = request("/v1/embeddings", BODY)
CHUNKED = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
UPLOAD = "Content-Type: multipart/form-data; boundary=b"


def answered(wire: Wire, status: int, says: str) -> WireAnswer:
    """The last answer on a connection."""
    answer = wire.answer()
    assert answer.status == status, answer.text
    assert says in answer.text
    assert answer.headers["connection"] == "close"
    assert wire.ended()
    return answer


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/embed", "/rerank", "/api/embed", "/v2/embed", "/jobs", "/v1/files"]
)
def test_a_body_that_stops_is_a_408(wired: Service, path: str) -> None:
    began = time.monotonic()
    with connected(wired.url) as wire:
        fields = [UPLOAD] if path == "/v1/files" else []
        wire.send(request(path, b"x" * 1000, *fields)[:-994])
        answered(wire, 408, "BODY_TIMEOUT")
    assert BODY_TIMEOUT - 0.5 < time.monotonic() - began < BODY_TIMEOUT + 10


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (request("/v1/embeddings", b" " * 10_000)[:-10_000], b" "),
        (CHUNKED, b"1\r\n \r\n"),
        pytest.param(CHUNKED, b"0", marks=pytest.mark.nightly),
        pytest.param(CHUNKED, b"", marks=pytest.mark.nightly),
    ],
    ids=["a byte at a time", "in chunks", "within a chunk's size", "nothing"],
)
def test_a_body_that_trickles_is_a_408(wired: Service, head: bytes, piece: bytes) -> None:
    began = time.monotonic()
    with connected(wired.url) as wire:
        wire.send(head)
        wire.trickle([piece] * 30, 0.1)
        answered(wire, 408, "BODY_TIMEOUT")
    assert time.monotonic() - began < BODY_TIMEOUT + 10


def test_a_body_may_pause(wired: Service) -> None:
    pieces = [b'{"input":"', b"x" * 4000, b"y" * 4000, b'"}']
    head = request("/v1/embeddings", b"".join(pieces)).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    with connected(wired.url) as wire:
        wire.send(head, *pieces, pause=BODY_TIMEOUT / 4)
        assert wire.answer().status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"1;" + b"x" * 200_000,
        b"1;x=y\r\n \r\n" * 20_000,
        b"1\r\n \r\n" * 100_000,
        b"0\r\n" + b"A: b\r\n" * 50_000,
        b"0" * 200_000,
        b"zz\r\n",
        b"-1\r\n",
        b"5\nabcde\r\n",
        b"3\r\nabcdef\r\n",
        b"ffffffffffffffff\r\n",
    ],
    ids=["extension", "extensions", "tiny", "trailers", "size", "no size", "negative", "bare LF", "longer", "huge"],
)
def test_chunks_that_are_none_are_a_400(wired: Service, body: bytes) -> None:
    with connected(wired.url) as wire:
        assert wire.trickle([CHUNKED, body], 0) or True  # it may be closed before all is sent
        answered(wire, 400, "chunk" if b"A: b" not in body else "trailers")


def test_many_small_chunks_are_read(wired: Service) -> None:
    data = b'{"input":"' + b"word " * 200 + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
    assert answer_to(wired.url, CHUNKED + chunks).status == 200


def test_a_body_of_unknown_length_is_held_to_the_limit(wired: Service) -> None:
    with connected(wired.url) as wire:
        wire.trickle([CHUNKED, *[b"10000\r\n" + b" " * 65_536 + b"\r\n"] * 30], 0)
        answered(wire, 413, "MAX_BODY_BYTES")


def test_the_answer_to_a_body_that_is_refused_is_not_lost(wired: Service) -> None:
    """The client sends all of it before it reads."""
    with connected(wired.url) as wire:
        wire.send(request("/v1/embeddings", b"x" * 8 * MAX_BODY_BYTES))
        answered(wire, 413, "MAX_BODY_BYTES")


@pytest.mark.parametrize("addresses", [1, 8], ids=["one client", "eight clients"])
def test_bodies_that_hold_back_their_last_byte_keep_nobody_out(wired: Service, addresses: int) -> None:
    before = psutil.Process(wired.pid).memory_info().rss
    with ExitStack() as stack:
        held = [stack.enter_context(connected(wired.url, f"127.0.0.{2 + n % addresses}")) for n in range(8)]
        for wire in held:
            wire.trickle([request("/embed", LARGE)[:-1]], 0)
        small = time.monotonic()
        assert answer_to(wired.url, EMBED).status == 200
        assert time.monotonic() - small < 5
        with connected(wired.url, "127.0.0.2") as same, connected(wired.url, "127.0.0.99") as other:
            for wire in (same, other):
                wire.send(request("/embed", LARGE))
            assert (other.answer().status, same.answer().status) == (200, 200)
        if addresses == 8:
            assert [wire.answer().status for wire in held] == [408] * 8
    assert psutil.Process(wired.pid).memory_info().rss - before < 300_000_000


def test_a_client_that_does_not_take_its_answers_is_ended(wired: Service) -> None:
    """It asks for some fifteen megabytes, and reads nothing."""
    server = psutil.Process(wired.pid)
    before = server.memory_info().rss
    with connected(wired.url, receive_buffer=4096) as wire:
        wire.send(request("/openapi.json", method="GET") * 100)
        until(lambda: wire.port in ports(server))
        until(lambda: wire.port not in ports(server))
        with pytest.raises((EOFError, ConnectionResetError)):
            _ = [wire.answer() for _ in range(100)]
    assert server.memory_info().rss - before < 30_000_000


def ports(server: psutil.Process) -> set[int]:
    """Of the clients that a process is connected to."""
    return {
        connection.raddr.port
        for connection in server.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }


def test_a_deadline_counts_from_the_first_byte(wired: Service) -> None:
    with connected(wired.url) as wire:
        asks = request("/v1/embeddings", b'{"input":"never embedded before this"}', "X-Request-Timeout: 0.5")
        wire.send(asks[:20], asks[20:-5], asks[-5:], pause=0.4)
        answer = wire.answer()
        assert answer.status == 504
        assert "X-Request-Timeout" in answer.text


def errors(server: Service) -> list[str]:
    """The counters of errors."""
    return [line for line in server.http.get("/metrics").text.splitlines() if line.startswith("vecmill_errors")]


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/embed", "/rerank", "/tokenize", "/jobs", "/v1/files", "/v1/batches"]
)
def test_a_client_that_leaves_in_mid_body_is_nothing_to_tell(wired: Service, path: str) -> None:
    before, log_length = errors(wired), len(wired.log())
    with connected(wired.url) as wire:
        fields = [UPLOAD] if path == "/v1/files" else []
        wire.send(request(path, b"x" * 200_000, *fields)[:-1000])
        wire.leave()
    lines = until(lambda: [line for line in wired.log()[log_length:].splitlines() if "499" in line and path in line])
    assert " debug " in lines[0]
    assert not any(word in wired.log()[log_length:] for word in ("Traceback", " error ", " warning "))
    assert errors(wired) == before


@pytest.fixture
def stopping(tmp_path: Path, minilm_folder: Path) -> Iterator[Service]:
    tiny = tiny_bert(tmp_path / "tiny", minilm_folder)
    with service(
        tiny, tmp_path / "state", tmp_path / "log", {"SHUTDOWN_SECONDS": "60", "BODY_TIMEOUT": "60"}
    ) as server:
        server.start()
        yield server


def test_a_stop_does_not_wait_for_a_body_that_does_not_come(stopping: Service) -> None:
    with connected(stopping.url) as body, connected(stopping.url) as head, connected(stopping.url) as idle:
        body.send(request("/v1/embeddings", b"x" * 1000)[:-994])
        head.send(b"POST /v1/embeddings HTTP/1.1\r\n")
        idle.send(request("/health", method="GET"))
        assert idle.answer().status == 200
        began = time.monotonic()
        stopping.signal(signal.SIGTERM)
        answered(body, 408, "BODY_TIMEOUT")
        assert idle.ended()
        assert stopping.ended_with() == 0
    assert time.monotonic() - began < 25
