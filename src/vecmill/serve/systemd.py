"""What systemd is told: how far the start is, that the server is ready, that it still works.

Sources: https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html (Type=notify, WatchdogSec=) and
https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from time import monotonic

from vecmill.core.health import Phase

logger = logging.getLogger(__name__)

SOCKET, WATCHDOG, WATCHDOG_PROCESS = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
MICROSECONDS = 1_000_000


class Notifier:
    """Sends what it is told where there is somebody to read it. Raises nothing; safe to use from any thread."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Takes the variables out: a child process must not speak for this one."""
        self._address = _address(environment.pop(SOCKET, ""))
        period, process = environment.pop(WATCHDOG, ""), environment.pop(WATCHDOG_PROCESS, "")
        ours = process in ("", str(os.getpid()))
        self.watchdog_seconds = int(period) / MICROSECONDS if ours and period.isdecimal() and int(period) else None
        """Seconds within which `WATCHDOG=1` is expected, again and again; None where nobody waits for it."""

    def __bool__(self) -> bool:
        return self._address is not None

    def send(self, **assignments: str | int) -> None:
        """One message, a line for each assignment."""
        if self._address is None:
            return
        lines = [f"{name}={' '.join(str(value).split())}" for name, value in assignments.items()]
        # An OSError: nobody reads, or the queue is full. That must not hold up the server.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:  # close-on-exec by default
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), self._address)


def _address(name: str) -> bytes | None:
    """A path, or an abstract name, which `@` stands for; VSOCK is for virtual machines and not spoken here."""
    if not hasattr(socket, "AF_UNIX") or name[:1] not in ("/", "@"):
        return None
    raw = os.fsencode(name)
    return b"\0" + raw[1:] if name.startswith("@") else raw


# While the start makes progress, TimeoutStartSec= is put off: the next progress may take this long, a download of
# gigabytes or the compiling of a layer in between.
LOADING_PATIENCE = 300 * MICROSECONDS
STATUS_EVERY = 0.5  # seconds, at least, between messages of one stage


class SystemdStatus:
    """Passes on every change of the server's health. Safe to use from any thread."""

    def __init__(self, notifier: Notifier, address: str) -> None:
        self._notifier = notifier
        self._address = address
        self._told_at = 0.0
        self._stage = ""

    def changed(self, phase: Phase, percent: float, message: str) -> None:
        """Tell systemd of the server's new health."""
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
    """Send `WATCHDOG=1` twice in each period that systemd waits for it, as long as `trouble` returns None.

    It is sent from the event loop, so that systemd also notices one that is stuck. `trouble` returns why the device
    makes no progress, else None.
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
