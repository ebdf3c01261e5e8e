"""All that is written to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

BAR_WIDTH = 30
INDENT = "      "


def say(text: str = "") -> None:
    """One line, at once: what follows may take minutes."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def detail(lines: Iterable[str]) -> None:
    """Lines that belong to the step above them."""
    for line in lines:
        say(f"{INDENT}{line}".rstrip())


def complain(text: str) -> None:
    """One line for whoever has to mend something."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """How far something is: one line that is rewritten in a terminal, else a line whenever it says something new."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._shown = ""

    def show(self, percent: float | None, message: str) -> None:
        """`percent` is None where nobody knows it."""
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
        """Leave the line free for what follows."""
        if self._terminal:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
