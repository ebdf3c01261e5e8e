"""`vecmill status` and `vecmill top` against `vecmill serve`, in a pipe and on a terminal."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import sleep
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from tests.servers import RunningServer, free_port
from vecmill.__main__ import cli
from vecmill.tools.status import screen

HOSTILE = "\x1b[2J\x1b]0;owned\x07 code"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_one_screen(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        body = {"project": HOSTILE, "total_chunks": 200, "instance_id": "editor"}
        job_id = client.post("/jobs", json=body).json()["job_id"]
        client.post("/embed", json={"inputs": ["a", "b"]}, headers={"x-job-id": job_id})
        client.post(f"/jobs/{job_id}/progress", json={"current": 50})
        try:
            result = run("status", "--url", server.url)
        finally:
            client.delete(f"/jobs/{job_id}")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"vecmill \S+ on \S+: ready, up .*", lines[0])
    assert any(re.match(r"last minute  [0-9.,]+ texts/s, ", line) for line in lines)
    assert any(re.match(r"memory       ours .* others .* free .* of ", line) for line in lines)
    job = next(line for line in lines if "code" in line and re.search("active|queued", line))  # others may have jobs
    assert re.search(r"50 of 200 .*given up in ", job)
    assert "\x1b" not in result.stdout  # a client's words do not move the cursor
    assert len(lines) < 60


def test_json_is_the_servers_own(server: RunningServer) -> None:
    result = run("status", "--url", server.url.removeprefix("http://"), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ready"]) == (0, True)
    assert {"now", "who", "jobs", "batches", "models", "machine", "refusals"} <= set(found)


@pytest.mark.parametrize("command", ["status", "top"])
def test_a_server_that_is_down_is_one_sentence(command: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = run(command, "--url", url)
    assert (result.exit_code, result.stdout) == (1, "")
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith(f"vecmill: {url} cannot be reached: ")


def test_an_address_that_is_none(server: RunningServer) -> None:
    assert run("status", "--url", "ftp://x").exit_code == 2
    assert run("status", "--url", server.url, "--key", "schlüssel").exit_code == 2


def test_top_in_a_pipe_prints_plain_lines(server: RunningServer) -> None:
    result = run("top", "--url", server.url, "--interval", "0.5", "--count", "2")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^vecmill \S+ on ", result.stdout, re.MULTILINE)) == 2
    assert "\x1b" not in result.stdout


def test_top_on_a_terminal_draws_over_itself(server: RunningServer) -> None:
    main, other = pty.openpty()
    command = [sys.executable, "-m", "vecmill", "top", "--url", server.url, "--interval", "0.5", "--count", "2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment)
    os.close(other)
    shown = b""
    try:
        while part := os.read(main, 65_536):
            shown += part
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait(60) == 0
    assert b"\x1b[?1049h" in shown
    assert shown.count(b"last minute") == 2


def test_what_is_not_known_is_not_zero() -> None:
    lines = screen({"status": "loading", "status_text": "importing torch", "ready": False, "now": {}, "machine": {}})
    assert "loading (importing torch)" in lines[0]
    assert "last minute  ? texts/s, ? tokens/s, ? requests/s, ? searches/s" in lines
    spark = {"name": "NVIDIA GB10", "sm_clock_mhz": 2400, "power_watts": None, "clock_verdict": "ok"}
    [_, gpu] = [line for line in screen({"machine": {"memory": {}, "gpu": spark}}) if line[:6] in ("memory", "GPU   ")]
    assert gpu == "GPU          NVIDIA GB10, ? busy, 2,400 MHz (ok), ? W, ? °C"


REPLICAS = {
    "count": 3,
    "problem": None,
    "totals": {"ready": 2, "texts_per_second": 300.0, "queue": {"texts": 7, "tokens": 70}},
    "items": [
        {"replica": "one", "this": True, "status": "ok", "version": "1.0", "texts_per_second": 100.0},
        {"replica": "two", "status": "ok", "version": "2.0", "memory": {"ours_bytes": 1024}, "queue": {"texts": 7}},
        {"replica": HOSTILE, "status": "gone", "gone_since": 0, "version": "1.0", "searches_p95_ms": None},
    ],
}


def test_replicas_are_shown_where_there_are_several() -> None:
    lines = screen({"version": "1.0", "replicas": REPLICAS})
    assert "replicas: 2 of 3 ready, together 300 texts/s, 7 texts waiting" in lines
    one, two, gone = lines[lines.index("replicas: 2 of 3 ready, together 300 texts/s, 7 texts waiting") + 2 :][:3]
    assert re.fullmatch(r"  one \(asked\) +ready +100 texts/s +\? +\? texts +\? +1.0", one)
    assert re.fullmatch(r"  two +ready +\? texts/s +\? +7 texts +1 KiB +2.0 \(differs\)", two)
    assert re.search(r"code +gone for \d+ d \d+ h +\? texts/s", gone)
    assert all(line.isprintable() for line in lines)
    alone = REPLICAS | {"count": 1, "items": REPLICAS["items"][:1]}  # type: ignore[index]
    assert not [line for line in screen({"replicas": alone}) if "replica" in line]
    problem = alone | {"problem": "Redis cannot be used."}
    assert "warning: Redis cannot be used." in screen({"replicas": problem})


OTHERS: tuple[object, ...] = (
    *(None, True, 5, 10**400, math.nan, math.inf),
    *("\x1b[2J", "\ud800", [], [[3]], {}, {"\x1b": {}}),
)


def wrong_forms(snapshot: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The snapshot with each of its values exchanged for something else."""
    for name, value in snapshot.items():
        for other in OTHERS:
            yield {**snapshot, name: other}
        if isinstance(value, dict):
            yield from ({**snapshot, name: inner} for inner in wrong_forms(value))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ({**snapshot, name: [inner]} for inner in wrong_forms(value[0]))


def test_a_snapshot_of_another_form_is_shown_as_far_as_it_goes() -> None:
    job = {"project": "code", "status": "active", "current": 1, "total_chunks": 2, "eta_seconds": 3}
    batch = {"id": "one", "status": "in_progress", "request_counts": {"total": 3, "completed": 1, "failed": 1}}
    snapshot = {
        "status": "ok",
        "uptime_seconds": 1,
        "warnings": [{"text": "hot"}],
        "replicas": REPLICAS | {"items": [REPLICAS["items"][1], REPLICAS["items"][2]]},  # type: ignore[index]
        "now": {
            "texts_per_second": 1,
            "latency_ms": {"bulk": {"p50": 1}},
            "queue": {"bulk": {"texts": 1}},
            "cache": {"hit_ratio": 0.5, "bytes": 3},
            "batch_fill": {"knee_tokens": 3},
        },
        "machine": {"memory": {"ours_bytes": 3, "gpu": {"ours_bytes": 3}}, "gpu": {"name": "GB10"}},
        "models": [{"id": "tiny", "memory_bytes": 3}],
        "jobs": {"counts": {"active": 1}, "items": [job]},
        "batches": {"counts": {"in_progress": 1}, "items": [batch]},
        "who": [{"key": "ann", "client": "127.0.0.1", "texts_per_second": 3}],
    }
    count = 0
    for wrong in wrong_forms(snapshot):
        lines = screen(wrong)
        assert all(line.isprintable() for line in lines), wrong
        count += 1
    assert count > 500


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that treats every connection, once its request is read, as a test says."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError):
                        connection.recv(65_536)
                        answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def whole(body: bytes, status: bytes = b"200 OK", head: bytes = b"") -> Callable[[socket.socket], None]:
    content = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n%b" % (status, len(body), head, body)
    return lambda connection: connection.sendall(content)


@pytest.mark.parametrize(
    "answer",
    [
        whole(b""),
        whole(b"[1, 2]"),
        whole(b"[" * 200_000),
        whole(b'{"now": ' * 200_000),
        whole(b"1" * 5000),
        whole(b"\x1b[2Jowned"),
        whole(b'{"error": "\\u001b]0;owned\\u0007"}', b"500 \x1b[2J"),
        whole(b'{"error": "\x1b[2J\xe2\x80\xae"}', b"400 Bad"),
        whole(b"no", b"503 Later", b"Retry-After: \xb2\r\n"),
        whole(b"no", b"503 Later", b"Retry-After: Mon, 01 Jan 99999999999999999999 00:00:00 GMT\r\n"),
        whole(b"no", b"503 Later", b"Retry-After: " + b"9" * 5000 + b"\r\n"),
        whole(b"no", b"302 Found", b"Location: file:///etc/passwd\r\n"),
        whole(b"{}", head=b"Content-Encoding: gzip\r\n"),
        lambda connection: connection.sendall(b"SSH-2.0-\x1b[2J\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        lambda connection: None,
    ],
)
@pytest.mark.parametrize("command", ["status", "top"])
def test_what_is_no_answer_is_one_sentence(command: str, answer: Callable[[socket.socket], None]) -> None:
    with answering(answer) as url:
        result = run(command, "--url", url)
    assert (result.exit_code in (1, 2), result.stdout) == (True, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("vecmill: ")
    assert result.stderr.replace("\n", "").isprintable()


def test_an_answer_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 1000)
            sleep(0.02)

    monkeypatch.setattr("vecmill.tools.status.ANSWER_SECONDS", 0.1)
    with answering(endless) as url:
        result = run("status", "--url", url)
    assert (result.exit_code, result.stderr.count("did not end its answer")) == (1, 1)
    monkeypatch.setattr("vecmill.tools.http_client.LARGEST_ANSWER", 2000)
    with answering(endless) as url:
        result = run("status", "--url", url)
    assert (result.exit_code, result.stderr.count("is larger than 2000 bytes")) == (1, 1)


def test_numbers_are_as_the_dashboard_writes_them() -> None:
    now = {
        "texts_per_second": 0.01,
        "device_busy_ratio": 0.999,
        "batch_fill": {"tokens_per_pass": 3661.0, "knee_tokens": 512.0, "ratio": 7.15},
        "cache": {"hit_ratio": 0.5, "tokens_saved": 12, "entries": 3, "bytes": 2048},
        "errors": 0,
        "refused": 2,
    }
    waiting = {
        "project": "later",
        "status": "queued",
        "total_chunks": 9,
        "current": 0,
        "position": 1,
        "estimated_wait": 5,
    }
    models = [{"id": "a", "state": "loaded", "memory_bytes": 90 * 2**20}, {"id": "b", "task": None, "state": "pulling"}]
    lines = screen({"now": now, "models": models, "uptime_seconds": 3000, "jobs": {"items": [waiting]}})
    assert lines[0].endswith("up 50 min")
    assert any(line.startswith("last minute  < 0.1 texts/s") for line in lines)
    assert "device       busy 99 %, 3,661 tokens a pass (full: 7.2 times the knee 512)" in lines
    assert "cache        50 % of the texts, 12 tokens saved since the start, 3 vectors in 2 KiB" in lines
    assert "errors       0 of the server's own, refused for the load 2, since the start" in lines
    assert [line for line in lines if line.startswith("model")] == [
        "model        a: loaded, 90.0 MiB",
        "model        b: pulling",
    ]
    assert any("position 1" in line and "starts in 5 s" in line for line in lines)
