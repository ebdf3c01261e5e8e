"""Things that may take too long: a call, and a command."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

COMMAND_SECONDS = 5.0


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """What the function gives; None where it takes longer, and is left behind in its thread.

    Raises:
        Exception: what the function raised.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # raised again in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return results[0] if results else None


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended; with status None it did not, or could not be started."""

    status: int | None
    stdout: str
    problem: str
    """One line: why it is of no use, empty where it succeeded."""


def ended(*command: str) -> Ended:
    """Run a command for COMMAND_SECONDS at the most."""
    try:
        done = subprocess.run(  # noqa: S603  # found on the PATH, as from a shell
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Ended(None, "", f"`{_shown(command)}` did not answer within {COMMAND_SECONDS:.0f} s")
    except OSError as error:
        return Ended(None, "", f"`{_shown(command)}` cannot be run ({error.strerror})")
    said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit status {done.returncode}"]
    return Ended(done.returncode, done.stdout, said[0] if done.returncode else "")


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)
