"""`vecmill status` and `vecmill top` against `vecmill serve`, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

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
