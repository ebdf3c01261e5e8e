"""`vecmill` with a wall clock that is days ahead, until SIGUSR1: `python -m tests.faults.moved_clock DAYS serve`."""

from __future__ import annotations

import signal
import sys
import time
from importlib import import_module

DAY = 86_400.0

real_time = time.time
ahead = float(sys.argv.pop(1)) * DAY


def moved_time() -> float:
    return real_time() + ahead


def set_back(number: int, frame: object) -> None:
    global ahead
    ahead = 0.0


if __name__ == "__main__":
    time.time = moved_time  # before modules take it for a name or a default of their own
    signal.signal(signal.SIGUSR1, set_back)
    import_module("vecmill.__main__").main()
