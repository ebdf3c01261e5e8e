"""Messages to systemd, or to whoever else reads NOTIFY_SOCKET.

Source: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

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
