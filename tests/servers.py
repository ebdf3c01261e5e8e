"""Starts a server as a process of its own, waits until it is ready, and always stops it again.

vecmill itself is forked from a process that has imported it, see tests.preloaded.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import httpx

from tests import preloaded

READY_WITHIN_S = 180.0
POLL_EVERY_S = 0.05
STOP_WITHIN_S = 15.0
LOG_TAIL_LINES = 20


@dataclass(frozen=True)
class RunningServer:
    """Where it answers and which process it is."""

    url: str
    process: Process

    @property
    def pid(self) -> int:
        return self.process.pid


class Process(Protocol):
    """A process that was started: what is needed of `subprocess.Popen`."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def vecmill_command(port: int, *options: str) -> list[str]:
    """The vecmill of this Python, on a port of this machine only."""
    return [sys.executable, "-m", "vecmill", "serve", "--port", str(port), *options]


PORTS = range(20_000, 32_000)
"""Below those that Linux gives to connections (32768 to 60999), which may take one before a server does."""


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := secrets.choice(PORTS)))
            return port


def start(command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], cwd: Path | None = None) -> Process:
    """Start a command in a session of its own: whatever it starts can be ended with it. Its errors go to `stdout`."""
    if preloaded.forks(command, env):
        return preloaded.fork(command, stdout, env, cwd or Path.cwd())
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True)


@dataclass(frozen=True)
class Ended:
    """How a command ended, and all that it wrote."""

    returncode: int
    output: str


def run(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, timeout: float = 90) -> Ended:
    """Run a command to its end. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as output:
        process = start(command, stdout=output, env=env, cwd=cwd)
        try:
            returncode = process.wait(timeout)
        finally:
            process.kill()
        output.seek(0)
        return Ended(returncode, output.read().decode())


@contextmanager
def running(
    command: Sequence[str], port: int, ready_path: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """The command's server while the block runs; RuntimeError with its log if it does not become ready.

    `environment` is added to this process's own. Unless it says otherwise, vecmill keeps its state in a folder that
    goes with the server, keeps no cache, and has small forward passes: warm-up runs the largest at each start.
    """
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as state:
        alone = {"STATE_DIR": state, "CACHE_MAX_BYTES": "0", "MAX_BATCH_TOKENS": "256"}
        process = start(command, stdout=log, env={**os.environ, **alone, **(environment or {})})
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url + ready_path, log)
            yield RunningServer(url, process)
        finally:
            _stop(process)


def _wait_until_ready(process: Process, url: str, log: IO[bytes]) -> None:
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


def _stop(process: Process) -> None:
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
