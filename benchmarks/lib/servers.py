"""Starts a server as a process of its own, waits until it is ready, and always stops it again.

Much of this is also in tests.servers, on purpose: importing anything of the tests gives this process, and every server
that it starts, one thread and no model hub. What is measured has to start as a user starts it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import httpx

READY_WITHIN_S = 180.0
POLL_EVERY_S = 0.2
STOP_WITHIN_S = 15.0
LOG_TAIL_LINES = 20


@dataclass(frozen=True)
class RunningServer:
    """Where it answers and which process it is."""

    url: str
    pid: int


def vecmill_command(port: int, *options: str) -> list[str]:
    """The vecmill of this Python, on a port of this machine only."""
    return [sys.executable, "-m", "vecmill", "serve", "--port", str(port), *options]


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], port: int, ready_path: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """The command's server while the block runs; RuntimeError with its log if it does not become ready.

    `environment` is added to this process's own. vecmill keeps its state in a folder that goes with the server, and no
    cache, unless the environment says otherwise.
    """
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as state:
        alone = {"STATE_DIR": state, "CACHE_MAX_BYTES": "0"}
        env = {**os.environ, **alone, **(environment or {})}
        # A session of its own: whatever the server starts can be ended with it.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url + ready_path, log)
            yield RunningServer(url, process.pid)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with status {process.returncode}:\n{_tail(log)}")
        if _answers(url):
            return
        time.sleep(POLL_EVERY_S)
    raise RuntimeError(f"{url} was not ready within {READY_WITHIN_S:.0f} s:\n{_tail(log)}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # A server of several processes may leave some behind, above all one that failed to start.
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
