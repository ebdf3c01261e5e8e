"""What systemd is told over its socket, by a real process."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.serve.broken_device import broken_device_command
from tests.servers import Process, free_port, start
from tests.tiny_checkpoints import tiny_bert
from vecmill.core.health import Phase
from vecmill.serve.systemd import Notifier, SystemdStatus

BEAT_SECONDS = 0.25


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """Where systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        yield listening


def received(systemd: socket.socket) -> dict[str, str]:
    """The next message."""
    return dict(line.split("=", 1) for line in systemd.recv(65536).decode().split("\n"))


def received_until(systemd: socket.socket, name: str, value: str = "") -> list[dict[str, str]]:
    """The messages up to the first with an assignment, the beats of the watchdog left out."""
    messages: list[dict[str, str]] = []
    while not messages or name not in messages[-1] or value not in messages[-1][name]:
        message = received(systemd)
        if message != {"WATCHDOG": "1"} or name == "WATCHDOG":
            messages.append(message)
    return messages


@contextmanager
def broken_device(model: Path, port: int, **environment: str) -> Iterator[Process]:
    """A server whose first forward pass after the start fails for good; it stays."""
    with open(os.devnull, "wb") as nowhere:
        command = broken_device_command(model, port, "stay")
        process = start(command, stdout=nowhere, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_from_the_start_to_the_end(systemd: socket.socket, tmp_path: Path, minilm_folder: Path) -> None:
    model, port = tiny_bert(tmp_path / "tiny", minilm_folder), free_port()
    environment = {
        "NOTIFY_SOCKET": systemd.getsockname(),
        "WATCHDOG_USEC": str(int(2e6 * BEAT_SECONDS)),
        "STATE_DIR": str(tmp_path / "state"),
        "DTYPE": "float32",
    }
    with broken_device(model, port, **environment) as process:
        *loading, ready = received_until(systemd, "READY")
        assert loading
        for message in loading:
            assert re.match(r"loading: \d+ % \w", message["STATUS"])
            assert int(message["EXTEND_TIMEOUT_USEC"]) > 60_000_000
        assert ready == {"READY": "1", "STATUS": f"ready on http://127.0.0.1:{port}"}
        received_until(systemd, "WATCHDOG")
        received_until(systemd, "WATCHDOG")

        process.send_signal(signal.SIGHUP)
        begun, done = received_until(systemd, "READY")
        assert begun["RELOADING"] == "1"
        assert int(begun["MONOTONIC_USEC"]) > 0
        assert done == {"READY": "1"}

        assert httpx.post(f"http://127.0.0.1:{port}/embed", json={"inputs": "x"}, timeout=60).status_code == 503
        [failed] = received_until(systemd, "STATUS")
        assert "failed: 503: the device has failed" in failed["STATUS"]
        systemd.settimeout(0)
        with suppress(BlockingIOError):  # until the beats are read that were on their way
            while received(systemd) == {"WATCHDOG": "1"}:
                pass
        systemd.settimeout(4 * BEAT_SECONDS)
        with pytest.raises(TimeoutError):
            received(systemd)

        systemd.settimeout(60)
        process.send_signal(signal.SIGTERM)
        [stopping] = received_until(systemd, "STOPPING")
        assert stopping["STATUS"] == "stopping: 0 requests in progress"
        assert int(stopping["EXTEND_TIMEOUT_USEC"]) == 35_000_000
        assert process.wait(60) == 1  # the device had failed


def test_an_abstract_address_and_a_watchdog_for_another_process() -> None:
    name = f"@vecmill-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:])
        listening.settimeout(60)
        environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1", "KEPT": "yes"}
        notifier = Notifier(environment)
        assert environment == {"KEPT": "yes"}  # no child process speaks for this one
        assert notifier.watchdog_seconds is None
        notifier.send(STATUS="two\nlines", READY=1)
        assert listening.recv(1024) == b"STATUS=two lines\nREADY=1"
    notifier.send(READY=1)  # nobody listens any more
    own = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier(own).watchdog_seconds == 1.5


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234", "/no/such/folder/socket", "/" + "long" * 100])
def test_where_nobody_reads_nothing_happens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "soon"})
    SystemdStatus(notifier, "http://x").changed(Phase.LOADING, 1, "x")
    assert notifier.watchdog_seconds is None
