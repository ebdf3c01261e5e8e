"""Signals as calls in the event loop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

STOP = (signal.SIGTERM, signal.SIGINT)
TERMINAL = "/dev/tty"


def on_signal(number: signal.Signals, call: Callable[[], None]) -> None:
    """Have the running event loop call a function on a signal."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, call)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda number, frame: loop.call_soon_threadsafe(call))


def ignore_stops() -> None:
    """Where there is no event loop (any more): a stop that was asked for is no failure."""
    for number in STOP:
        signal.signal(number, lambda number, frame: None)


def end_at_next_stop() -> None:
    """Leave the next signal to the system, which ends the process with it."""
    for number in STOP:
        signal.signal(number, signal.SIG_DFL)


def on_hangup(reload: Callable[[], None], stop: Callable[[], None]) -> None:
    """SIGHUP: from whoever changed the settings; or from a terminal that is closed, whose programs end with it.

    Under nohup, and on Windows, there is none.
    """
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return
    had_terminal = _has_terminal()
    on_signal(signal.SIGHUP, lambda: stop() if had_terminal and not _has_terminal() else reload())


def _has_terminal() -> bool:
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
