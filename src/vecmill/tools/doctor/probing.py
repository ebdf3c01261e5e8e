"""The process in which the probes run, asked one probe at a time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import IO, Any, Self, TypeVar

import orjson
from pydantic import TypeAdapter

from vecmill.core.own_python import OWN_PYTHON

T = TypeVar("T")

COMMAND = (*OWN_PYTHON, "-m", "vecmill.engine.probes")
LOOK_EVERY = 0.2  # seconds
END_WITHIN = 5.0  # seconds; a process that hangs in the driver may not end at all, and is left behind
LAST_BYTES = 2000


class ProbeFailed(Exception):
    """A probe gave no result. `kind` is the class of what it raised, or what became of its process."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(f"{kind}: {message}" if message else kind)


class Prober:
    """Starts the process when it is first asked, and a new one after a probe that did not end well."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def ask(
        self, probe: str, device: str, result: type[T], seconds: float, meanwhile: Callable[[], None] = lambda: None
    ) -> T:
        """Run a probe; `meanwhile` is called a few times a second until it is done.

        Raises:
            ProbeFailed: it raised, its process died, or it took longer than `seconds`.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(orjson.dumps({"probe": probe, "device": device}) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer = self._answer(process, seconds, meanwhile)
        if (error := answer.get("error")) is not None:
            raise ProbeFailed(error["type"], error["message"])
        return TypeAdapter(result).validate_python(answer["result"])

    def close(self) -> None:
        """End the process, and whatever it started."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_WITHIN)
            for pipe in (process.stdin, process.stdout, self._errors):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
            self._process = subprocess.Popen(  # noqa: S603  # our own Python
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # One compiler beside it is enough for what is compiled here.
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
                # A group of its own: Ctrl-C is for the doctor, which ends the group.
                start_new_session=True,
            )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], seconds: float, meanwhile: Callable[[], None]) -> Any:
        assert process.stdout is not None
        pipe, deadline, answer = process.stdout.fileno(), monotonic() + seconds, b""
        while not answer.endswith(b"\n"):
            left = deadline - monotonic()
            if left <= 0:
                self.close()
                raise ProbeFailed("TimeoutError", f"no result within {seconds:g} s")
            readable, _, _ = select.select([pipe], [], [], min(left, LOOK_EVERY))
            if not readable:
                meanwhile()
            elif part := os.read(pipe, 65_536):
                answer += part
            else:
                raise self._died()
        return orjson.loads(answer)

    def _died(self) -> ProbeFailed:
        assert self._process is not None
        assert self._errors is not None
        status = self._process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - LAST_BYTES))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        self.close()
        kind = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return ProbeFailed(kind, lines[-1] if lines else "")
