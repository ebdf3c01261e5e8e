"""`vecmill serve` as a process that may be killed and started again, on the same port and the same state folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.servers import Process, free_port, start

T = TypeVar("T")

PATIENCE = 60.0  # seconds
LOOK_EVERY = 0.05
# A small model with small forward passes: a start takes little more than the imports.
SMALL = {"DEVICE": "cpu", "DTYPE": "float32", "TORCH_COMPILE": "false", "MAX_BATCH_TOKENS": "256"}
SERVE = ("-m", "vecmill", "serve")


class Service:
    """One server, at most one process of it at a time. Its log goes on over all of them."""

    def __init__(
        self,
        model: Path,
        state: Path,
        log: Path,
        settings: Mapping[str, str] | None = None,
        *,
        within: Sequence[str] = (),
        serve: Sequence[str] = SERVE,
    ) -> None:
        """`within`: a command that runs the command after it in the same process. `serve`: Python's arguments."""
        port = free_port()
        self._command = [*within, sys.executable, *serve, "--port", str(port), "--embed-model", str(model)]
        self._environment = {**os.environ, **SMALL, "STATE_DIR": str(state), **(settings or {})}
        self._log = log
        self._process: Process | None = None
        self.url = f"http://127.0.0.1:{port}"
        self.state = state
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    @property
    def pid(self) -> int:
        """Of the present process."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start a process, and do not wait for it."""
        with self._log.open("ab") as log:
            self._process = start(self._command, stdout=log, env=self._environment)

    def start(self) -> None:
        """Start a process and wait until it serves."""
        self.launch()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait for a launched process."""
        until(self.is_ready)

    def is_ready(self) -> bool:
        """Whether it serves. AssertionError, with its log, where it has ended."""
        assert self._process is not None
        assert self._process.poll() is None, f"it ended with status {self._process.returncode}:\n{self.log()[-4000:]}"
        try:
            return self.http.get("/ready").is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """SIGKILL: it gets no chance to do anything any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait(PATIENCE) == -signal.SIGKILL

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the present process."""
        os.kill(self.pid, number)

    def set(self, **settings: str) -> None:
        """Change settings of the processes that are started from now on."""
        self._environment.update(settings)

    def ended_with(self) -> int:
        """Wait until the process ends by itself; its exit status."""
        assert self._process is not None
        return self._process.wait(PATIENCE)

    def runs(self) -> bool:
        """Whether the present process has not ended."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """The log of all processes so far."""
        return self._log.read_text()

    def close(self) -> None:
        """Leave no process behind, whether it runs, is ending or has ended."""
        self.http.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)

    def get(self, path: str) -> Any:
        """The JSON of an answer that must be a success."""
        return succeeded(self.http.get(path))

    def post(self, path: str, body: object = None, **headers: str) -> Any:
        """The JSON of an answer that must be a success."""
        return succeeded(self.http.post(path, json=body, headers=headers))

    def cached(self, texts: Sequence[str]) -> int:
        """Embed the texts, check the answer, and return how many came from the cache."""
        answer = self.http.post("/embed", json={"inputs": list(texts)})
        assert len(succeeded(answer)) == len(texts)
        return int(answer.headers.get("X-Cached-Inputs", "0"))

    def assert_healthy(self) -> None:
        """Wait until the service is ready and can write its state, cache, jobs and batches."""

        def look() -> bool:
            health = self.get("/health")
            return health["status"] == "ok" and all(
                health[name]["ok"] for name in ("state", "cache", "jobs", "batches")
            )

        until(look)  # it looks at the disk every second


def succeeded(answer: httpx.Response) -> Any:
    """The JSON of an answer that must be a success."""
    assert answer.is_success, f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text[:1000]}"
    return answer.json()


def until(look: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """Call `look` until it returns something true, and return that. AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(LOOK_EVERY)
    return value


@contextmanager
def service(*args: Any, **kwargs: Any) -> Iterator[Service]:
    """A `Service` whose process is not started yet; it is closed when the block ends."""
    server = Service(*args, **kwargs)
    try:
        yield server
    finally:
        server.close()


def small_disk(folder: Path, size: str, *, read_only: bool = False) -> list[str]:
    """A prefix for a command: runs it in a mount namespace in which the folder is a disk of this size."""
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0"'
    if read_only:
        mount += ' && mount -o remount,ro "$0"'
    return ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$@"', str(folder)]
