"""`vecmill doctor` run from the dashboard: in a process of its own, one at a time, for a limited time."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from time import time
from typing import Any, cast

import orjson
import psutil
from fastapi import APIRouter, Request

from vecmill.config import Settings
from vecmill.core.errors import NotAllowed, ShuttingDown
from vecmill.core.own_python import OWN_PYTHON
from vecmill.core.types import Viewer
from vecmill.http.errors import documented
from vecmill.http.route import ViewerOf

COMMAND = (*OWN_PYTHON, "-m", "vecmill", "doctor", "--json")
LONGEST_SECONDS = 300.0
NICE = 10  # searches go first
LARGEST_OUTPUT = 2**20

router = APIRouter(tags=["Dashboard"], responses=documented(403))


@dataclass(frozen=True, slots=True)
class DoctorRun:
    """One run; times are Unix times. `result` is the command's object; `error` is why there is none."""

    started_at: float
    ended_at: float | None = None
    result: dict[str, Any] | None = None
    error: str | None = None


class Doctor:
    """Runs it. Belongs to the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self._environment = {**os.environ, **environment_of(settings)}
        self._last: DoctorRun | None = None
        self._running: asyncio.Task[None] | None = None
        self._stopping = False

    def view(self) -> dict[str, Any]:
        """The last run, as JSON; its result is that of the run before while one is under way."""
        run = self._last
        return {
            "running": self._running is not None,
            "started_at": run and run.started_at,
            "ended_at": run and run.ended_at,
            "result": run and run.result,
            "error": run and run.error,
        }

    def start(self) -> None:
        """Begin a run, unless one is under way.

        Raises:
            ShuttingDown: the server stops.
        """
        if self._stopping:
            raise ShuttingDown
        if self._running is None:
            before = self._last.result if self._last else None
            self._last = DoctorRun(time(), result=before)
            self._running = asyncio.create_task(self._run(self._last.started_at), name="doctor")

    def refuse(self) -> None:
        """Begin no further run: the server stops."""
        self._stopping = True

    async def close(self) -> None:
        """End a run that is under way, and begin no other."""
        self.refuse()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self, started_at: float) -> None:
        result, error = None, None
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                result = await self._result()
        except TimeoutError:
            error = f"It took longer than {LONGEST_SECONDS:.0f} s and was ended; run `vecmill doctor` in a terminal."
        except (OSError, ValueError) as problem:
            error = f"It gave no result ({type(problem).__name__}); run `vecmill doctor` in a terminal."
        finally:
            self._running = None
        self._last = DoctorRun(started_at, time(), result, error)

    async def _result(self) -> dict[str, Any]:
        """The object that the command prints.

        Raises:
            OSError: it cannot be started. ValueError: it printed something else.
        """
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LARGEST_OUTPUT,
            start_new_session=True,  # so that its probes end with it
        )
        try:
            with suppress(psutil.Error):
                psutil.Process(process.pid).nice(NICE)
            assert process.stdout is not None  # it is a pipe
            output = b""
            while len(output) <= LARGEST_OUTPUT and (part := await process.stdout.read(2**16)):
                output += part
            result = orjson.loads(output)
        finally:
            _end(process)
            await process.wait()
        if not isinstance(result, dict):
            raise ValueError("it printed no object")
        return result


def _end(process: asyncio.subprocess.Process) -> None:
    """End it with all that it has started; what has ended already is left alone."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings that were given, as environment variables: the command must look at what this server runs with.

    Secrets are left out. What the environment or `.env` has of them the command reads there.
    """
    variables: dict[str, str] = {}
    for part in fields(settings):
        group = getattr(settings, part.name)
        for name in group.model_fields_set:
            if (text := _text(getattr(group, name))) is not None:
                variables[name.upper()] = text
    return variables


def _text(value: object) -> str | None:
    """A setting as it is written; None for what has no such form."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float | Path):
        return str(value)
    if isinstance(value, tuple) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    return None


def doctor_of(request: Request, viewer: Viewer) -> Doctor:
    """Of the application that serves this request.

    Raises:
        NotAllowed: the key is no administrator's.
    """
    if not viewer.everything:
        raise NotAllowed(
            "/dashboard/doctor is for keys with the scope `admin`: send such a key, or that of ADMIN_API_KEY."
        )
    return cast(Doctor, request.app.state.doctor)


@router.post("/dashboard/doctor", summary="Run vecmill doctor", status_code=202, responses=documented(503))
async def run_doctor(request: Request, viewer: ViewerOf) -> dict[str, Any]:
    """Begin to check the machine and the settings; one run at a time. Needs the scope `admin` where there are keys."""
    doctor = doctor_of(request, viewer)
    doctor.start()
    return doctor.view()


@router.get("/dashboard/doctor", summary="The last result of vecmill doctor")
async def get_doctor(request: Request, viewer: ViewerOf) -> dict[str, Any]:
    """Whether a run is under way, when the last one was, and what it found, as `vecmill doctor --json` prints it."""
    return doctor_of(request, viewer).view()
