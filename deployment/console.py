"""Runs other programs, and writes to the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

BAR_WIDTH = 30
INDENT = "      "


def say(text: str = "") -> None:
    """Write one line and flush it: what follows may take minutes."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def detail(lines: Iterable[str]) -> None:
    """Write lines, indented below the step they belong to."""
    for line in lines:
        say(f"{INDENT}{line}" if line else "")


def complain(text: str) -> None:
    """Write one line to stderr."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class ProgressLine:
    """Progress: one line that is rewritten in a terminal, otherwise a new line whenever the message changes."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._shown = ""

    def show(self, percent: float | None, message: str) -> None:
        """`percent` is None if it is unknown."""
        if self._terminal:
            filled = round(BAR_WIDTH * (percent or 0) / 100)
            bar = "" if percent is None else f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {percent:3.0f} % "
            sys.stdout.write(f"\r\x1b[K{INDENT}{bar}{message[:60]}")
            sys.stdout.flush()
            return
        line = message if percent is None else f"{percent:3.0f} % {message}"
        if line != self._shown:
            self._shown = line
            detail([line])

    def clear(self) -> None:
        """Clear the line."""
        if self._terminal:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()


TAIL_LINES = 15
ASK_WITHIN_S = 30
ELSEWHERE = "/"
"""Where programs run. Python's `-c` and `-m` import what lies in the working folder, and the caller's may be /tmp."""


class Failed(Exception):
    """Something could not be done. `output` is the end of what the program wrote."""

    def __init__(self, what: str, output: str = "") -> None:
        super().__init__(what)
        self.output = output


def ask(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program that changes nothing. Return code 127 if it is missing, 124 if it does not end in time."""
    try:
        return subprocess.run(
            argv, cwd=ELSEWHERE, capture_output=True, text=True, errors="replace", timeout=ASK_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no answer within {ASK_WITHIN_S} s")
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, "", str(error.strerror))


def ask_json(*argv: str) -> dict[str, Any] | None:
    """The JSON object (or the first of a list) that a program prints; None if it fails or prints none."""
    answered = ask(*argv)
    try:
        value = json.loads(answered.stdout) if answered.returncode == 0 else None
    except ValueError:
        return None
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, dict) else None


def tell(argv: Sequence[str], shown: bool) -> str:
    """Run a program to its end; returns the last lines of its output. Raises Failed if its exit code is not 0.

    `shown`: its output is passed on while it runs.
    """
    try:
        process = subprocess.Popen(
            argv,
            cwd=ELSEWHERE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with process:
        try:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                if shown:
                    detail([f"  {tail[-1]}"])
            code = process.wait()
        except BaseException:  # an interrupted deployment leaves no program running behind it
            process.terminate()
            process.wait()
            raise
    output = "\n".join(tail)
    if code != 0:
        raise Failed(f"exit code {code}", output)
    return output
