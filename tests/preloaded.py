"""Runs `python -m MODULE` in a process of its own without its imports: forked from a process that has made them.

Importing torch and transformers takes most of a server's start, and the tests start about a hundred. What runs is the
same from there on: arguments, environment, files, session and signals are the process's own; only warm-up times each
shape fewer times. A command that wants another environment at the time of these imports gets an ordinary process.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

MODULES = ("vecmill.app", "vecmill.engine.engine", "vecmill.serve.process", "vecmill.telemetry.logs", "uvloop")
PYTHON = [sys.executable, "-m"]
# What libraries read while they are imported.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "PYTORCH_", "CUDA_", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "PYTHON", "LD_")
LARGEST = 1_000_000  # bytes of a command and its environment
# How often warm-up times each shape in servers and applications of the tests, and each number of threads: once. More
# rounds make its figures steadier, on which no test depends, and were two thirds of what a start costs.
SHORT_WARM_UP = {"vecmill.engine.warmup.ROUNDS": 1, "vecmill.engine.forward.SINGLE_THREAD_RUNS": 1}


def forks(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """True for a module of vecmill or the tests whose environment equals this one in all that imports read."""
    return (
        list(command[:2]) == PYTHON
        and command[2].partition(".")[0] in ("vecmill", "tests")
        and _at_import(env) == _at_import(os.environ)
    )


def fork(command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], cwd: Path) -> Forked:
    """Start a command that `forks`, in a session of its own; its errors go where its output goes."""
    return _parent().fork(command, stdout, env, cwd)


def _at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


class Forked:
    """A process that another one is the parent of. Its methods are those of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], reports: socket.socket) -> None:
        self._args = args
        self._reports = reports.makefile("rb", buffering=0)
        self._socket = reports
        self.pid = int(self._reports.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._wait_for_word(timeout)
            self.returncode = int(self._reports.readline())
            self._reports.close()
            self._socket.close()
        return self.returncode

    def _wait_for_word(self, timeout: float | None) -> None:
        ready, _, _ = select.select([self._socket], [], [], timeout)
        if not ready:
            raise subprocess.TimeoutExpired(list(self._args), timeout or 0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that has imported everything, and forks. One for each process of the tests."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self.close)

    def fork(self, command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], cwd: Path) -> Forked:
        """A new process."""
        reader, writer = socket.socketpair()
        with writer:
            message = {"arguments": list(command[2:]), "environment": dict(env), "folder": str(cwd)}
            socket.send_fds(self._control, [json.dumps(message).encode()], [stdout.fileno(), writer.fileno()])
        return Forked(command, reader)

    def close(self) -> None:
        """End it, and with it whatever still runs."""
        self._control.close()
        self._process.wait()


@cache
def _parent() -> _Parent:
    return _Parent()


def main() -> None:
    """Import everything, then fork for every message until the other end of the socket is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    import_module("vecmill.app")._set_thread_defaults()
    for module in MODULES:
        import_module(module)
    for constant, value in SHORT_WARM_UP.items():
        module, _, name = constant.rpartition(".")
        setattr(import_module(module), name, value)
    # Exempt all objects from later collections, which would copy every page of them in each forked process.
    gc.collect()
    gc.freeze()
    ends, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, _nothing)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _nothing)  # Ctrl-C is for the tests
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, ends], [], [])
        if ends in ready:
            ends.recv(4096)
            _tell_ends(running)
        if control in ready and not _fork(control, [ends, wakes], running):
            break
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _fork(control: socket.socket, others: Sequence[socket.socket], running: dict[int, socket.socket]) -> bool:
    """Fork a process for the next message; False if there will be no more. Does not return in the new process."""
    message, files, *_ = socket.recv_fds(control, LARGEST, 2)
    if not message:
        return False
    stdout, tells = files
    pid = os.fork()
    if not pid:
        _become(json.loads(message), stdout, [control, *others, *running.values()], tells)
        sys.exit()
    os.close(stdout)
    running[pid] = socket.socket(fileno=tells)
    running[pid].sendall(f"{pid}\n".encode())
    return True


def _nothing(number: int, frame: object) -> None:
    """Only wakes `select`."""


def _tell_ends(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as tells, suppress(OSError):  # nobody waits for it
                tells.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(message: dict[str, Any], stdout: int, sockets: Sequence[socket.socket], tells: int) -> None:
    """In the new process: run the command of the message."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for inherited in sockets:
        inherited.close()
    os.close(tells)
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stdout, 2)
    os.close(stdout)
    os.environ.clear()
    os.environ.update(message["environment"])
    os.chdir(message["folder"])
    sys.argv = message["arguments"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        _leave(end.code or 0)
    _leave(0)


def _leave(status: int) -> NoReturn:
    """End as Python does, but without freeing all that was imported, which would copy every page of it."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
