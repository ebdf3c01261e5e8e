"""Runs `python -m MODULE` in a process of its own without its imports: forked from a process that has made them.

Importing torch and transformers takes most of a server's start, and the tests start about a hundred. What runs is the
same from there on: arguments, environment, files, session and signals are the process's own; only warm-up times each
shape fewer times. A command that wants another environment at the time of these imports gets an ordinary process.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

MODULES = ("vecmill.app", "vecmill.engine.engine", "vecmill.serve.process", "vecmill.telemetry.logs", "uvloop")
PYTHON = [sys.executable, "-m"]
# What libraries read while they are imported.
READ_AT_IMPORT = (
    *("HF_", "TRANSFORMERS_", "PYTORCH_", "CUDA_", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "PYTHON", "LD_"),
    *("MALLOC_", "GLIBC_"),
)
UNFORKED = ("tests.faults.moved_clock",)  # what has to run before anything is imported
SHARED = "VECMILL_TESTS_PRELOADED"  # the folder of the socket of the process that several fork from
LARGEST = 1_000_000  # bytes of a command and its environment
# How often warm-up times each shape in servers and applications of the tests, and each number of threads: once. More
# rounds make its figures steadier, on which no test depends, and were two thirds of what a start costs.
# What is measured when a server is idle would come in the midst of a test: it is left out.
SHORT_WARM_UP = {
    "vecmill.engine.warmup.ROUNDS": 1,
    "vecmill.engine.forward.SINGLE_THREAD_RUNS": 1,
    "vecmill.inference.measuring.QUIET_SECONDS": 86_400.0,
}


def forks(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """True for a module of vecmill or the tests whose environment equals this one in all that imports read; never for
    one of UNFORKED."""
    return (
        list(command[:2]) == PYTHON
        and command[2].partition(".")[0] in ("vecmill", "tests")
        and command[2] not in UNFORKED
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


def share_between_workers() -> None:
    """Let all processes of this run that are started from here on fork from one process, which the first of them that
    forks anything starts. Left out, each has its own, and pays for the imports.
    """
    folder = tempfile.mkdtemp(prefix="preloaded-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[SHARED] = folder


class _Parent:
    """A connection to the process that has imported everything, and forks. Whatever was forked for this connection ends
    with it, and the process ends with its last connection."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None  # where it is this connection's to start and to wait for
        with ExitStack() as stack:
            folder = Path(os.environ.get(SHARED) or stack.enter_context(tempfile.TemporaryDirectory()))
            lock = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._control = _connected(folder)
            except OSError:
                self._process = self._started(folder)
                self._control = _connected(folder)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
        atexit.register(self.close)

    @staticmethod
    def _started(folder: Path) -> subprocess.Popen[bytes]:
        (folder / "socket").unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            return subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", str(listener.fileno())],
                pass_fds=[listener.fileno()],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def fork(self, command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], cwd: Path) -> Forked:
        """A new process."""
        reader, writer = socket.socketpair()
        with writer:
            message = {"arguments": list(command[2:]), "environment": dict(env), "folder": str(cwd)}
            socket.send_fds(self._control, [json.dumps(message).encode()], [stdout.fileno(), writer.fileno()])
        return Forked(command, reader)

    def close(self) -> None:
        """End whatever still runs of what was forked, and the process if nobody else forks from it."""
        self._control.close()
        if self._process is not None:
            self._process.wait()


@cache
def _parent() -> _Parent:
    return _Parent()


def _connected(folder: Path) -> socket.socket:
    """Raises OSError where no process listens yet, or none any more."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        control.connect(str(folder / "socket"))
    except OSError:
        control.close()
        raise
    return control


def _import_everything() -> None:
    import_module("vecmill.app")._set_thread_defaults()
    for module in MODULES:
        import_module(module)
    for constant, value in SHORT_WARM_UP.items():
        module, _, name = constant.rpartition(".")
        setattr(import_module(module), name, value)
    # Exempt all objects from later collections, which would copy every page of them in each forked process.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Import everything, then fork for every message, until the last connection is closed."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    _import_everything()
    ends, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, _nothing)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _nothing)  # Ctrl-C is for the tests
    running: dict[int, _Running] = {}
    controls = [listener.accept()[0]]
    while controls:
        ready, _, _ = select.select([listener, ends, *controls], [], [])
        if ends in ready:
            ends.recv(4096)
            _tell_ends(running)
        if listener in ready:
            controls.append(listener.accept()[0])
        for control in [control for control in controls if control in ready]:
            if not _fork(control, [listener, ends, wakes, *controls], running):
                controls.remove(control)
                _kill_all_of(control, running)
                control.close()


@dataclass(frozen=True)
class _Running:
    """A forked process: the connection that it was forked for, and the socket that tells of its end."""

    control: socket.socket
    tells: socket.socket


def _fork(control: socket.socket, others: Sequence[socket.socket], running: dict[int, _Running]) -> bool:
    """Fork a process for the next message; False if there will be no more. Does not return in the new process."""
    message, files, *_ = socket.recv_fds(control, LARGEST, 2)
    if not message:
        return False
    stdout, tells = files
    pid = os.fork()
    if not pid:
        _become(json.loads(message), stdout, [*others, *(each.tells for each in running.values())], tells)
        sys.exit()
    os.close(stdout)
    running[pid] = _Running(control, socket.socket(fileno=tells))
    running[pid].tells.sendall(f"{pid}\n".encode())
    return True


def _kill_all_of(control: socket.socket, running: Mapping[int, _Running]) -> None:
    for pid, process in running.items():
        if process.control is control:
            os.kill(pid, signal.SIGKILL)


def _nothing(number: int, frame: object) -> None:
    """Only wakes `select`."""


def _tell_ends(running: dict[int, _Running]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid).tells as tells, suppress(OSError):  # nobody waits for it
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
