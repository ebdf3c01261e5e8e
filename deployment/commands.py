"""Other programs: asked, or told to do something."""

from __future__ import annotations

import json
import subprocess
from collections import deque
from collections.abc import Sequence
from typing import Any

from deployment import console

TAIL_LINES = 15
ASK_WITHIN_S = 30


class Failed(Exception):
    """Something could not be done. `said` is the end of what the program wrote."""

    def __init__(self, what: str, said: str = "") -> None:
        super().__init__(what)
        self.said = said


def ask(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program that changes nothing; 127 where it is missing, 124 where it does not answer."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=ASK_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no answer within {ASK_WITHIN_S} s")
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, "", str(error.strerror))


def ask_json(*argv: str) -> dict[str, Any] | None:
    """The JSON object (or the first of a list) that a program prints; None where it fails or prints none."""
    answered = ask(*argv)
    try:
        found = json.loads(answered.stdout) if answered.returncode == 0 else None
    except ValueError:
        return None
    if isinstance(found, list):
        found = found[0] if found else None
    return found if isinstance(found, dict) else None


def tell(argv: Sequence[str], shown: bool) -> str:
    """Run a program to its end; what it wrote last. `Failed` with its exit code otherwise.

    `shown`: its output is passed on while it runs.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            if shown:
                console.detail([f"  {tail[-1]}"])
        code = process.wait()
    except BaseException:  # an interrupted deployment leaves no program running behind it
        process.terminate()
        process.wait()
        raise
    said = "\n".join(tail)
    if code != 0:
        raise Failed(f"exit code {code}", said)
    return said
