"""The process of a server whose device has died: everyone is answered, and a supervisor is told by the exit code."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.broken_device import broken_device_command
from tests.servers import RunningServer, free_port, running
from tests.tiny_checkpoints import tiny_bert


@pytest.fixture(params=["exit", "stay"])
def server(request: pytest.FixtureRequest, tmp_path: Path, minilm_folder: Path) -> Iterator[tuple[RunningServer, str]]:
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    port = free_port()
    command = broken_device_command(folder, port, request.param)
    with running(command, port, "/ready") as server:
        yield server, request.param


def test_everyone_who_waits_is_answered_and_the_supervisor_told(server: tuple[RunningServer, str]) -> None:
    running_server, then = server

    def ask(number: int) -> httpx.Response:
        body = {"input": [f"text {number} {index}" for index in range(200)]}
        return httpx.post(f"{running_server.url}/v1/embeddings", json=body, timeout=30)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert [answer.status_code for answer in answers] == [503] * 8
    if then == "exit":
        assert running_server.process.wait(30) == 1
    else:
        health = httpx.get(f"{running_server.url}/health", timeout=10)
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "must be restarted" in health.json()["message"]
        assert running_server.process.poll() is None
