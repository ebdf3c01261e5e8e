"""What systemd is told: how far the start is, that the server is ready, that it still works.

Source: https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html (Type=notify, WatchdogSec=)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from vecmill.core.health import Phase
from vecmill.serve.notifier import MICROSECONDS, Notifier

logger = logging.getLogger(__name__)

# While the start makes progress, TimeoutStartSec= is put off: the next progress may take this long, a download of
# gigabytes or the compiling of a layer in between.
LOADING_PATIENCE = 300 * MICROSECONDS
STATUS_EVERY = 0.5  # seconds, at least, between messages of one stage


class Status:
    """Passes on every change of the server's health. Safe to use from any thread."""

    def __init__(self, notifier: Notifier, address: str) -> None:
        self._notifier = notifier
        self._address = address
        self._told_at = 0.0
        self._stage = ""

    def changed(self, phase: Phase, percent: float, message: str) -> None:
        """The health is this now."""
        if phase is Phase.LOADING:
            stage = message.partition(":")[0]
            if stage != self._stage or monotonic() - self._told_at >= STATUS_EVERY:
                self._stage, self._told_at = stage, monotonic()
                status = f"loading: {percent:.0f} % {message}"
                self._notifier.send(STATUS=status, EXTEND_TIMEOUT_USEC=LOADING_PATIENCE)
        elif phase is Phase.READY:
            self._notifier.send(READY=1, STATUS=f"ready on {self._address}")
        elif phase is Phase.FAILED:
            self._notifier.send(STATUS=f"failed: {message}")


async def feed_watchdog(notifier: Notifier, trouble: Callable[[], str | None]) -> None:
    """Say that all is well, twice within the time that systemd waits for it, for as long as it is.

    It is said from the event loop, so one that is stuck says nothing. `trouble`: why the device does not get on.
    """
    if notifier.watchdog_seconds is None:
        return
    told = None
    while True:
        reason = trouble()
        if reason is None:
            notifier.send(WATCHDOG=1)
        elif told is None:
            logger.error("the watchdog is told nothing any more: %s", reason)
        told = reason
        await asyncio.sleep(notifier.watchdog_seconds / 2)
