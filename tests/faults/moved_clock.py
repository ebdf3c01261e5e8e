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


def move() -> None:
    """Exchange the clock, also where a module has it under a name of its own: a forked process has many modules."""
    time.time = moved_time
    for module in list(sys.modules.values()):
        for name in [name for name, value in vars(module).items() if value is real_time]:
            if module is not sys.modules[__name__]:
                setattr(module, name, moved_time)


if __name__ == "__main__":
    move()
    signal.signal(signal.SIGUSR1, set_back)
    import_module("vecmill.__main__").main()
