"""The stop, from a signal to the end of the process: what comes is refused, what runs is answered, and all of it takes
no longer than it may."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from vecmill.app import Server
from vecmill.config import HttpSettings
from vecmill.serve.http_server import LAST_ANSWERS, HttpServer
from vecmill.serve.systemd import MICROSECONDS, Notifier

logger = logging.getLogger(__name__)

# Seconds after SHUTDOWN_SECONDS, or after the second signal, when the process has ended at the latest. In them clients
# take their last answers, the cache and the jobs are written, and a forward pass may end.
CLOSING_SECONDS = 5.0


class Stopping:
    """One stop, from the signal to the end of the last answer. Belongs to the event loop's thread."""

    def __init__(
        self, server: Server, http: HttpServer, settings: HttpSettings, notifier: Notifier, last_resort: LastResort
    ) -> None:
        self._server = server
        self._http = http
        self._seconds: float = settings.shutdown_seconds
        self._drain_seconds = settings.drain_seconds
        self._notifier = notifier
        self._last_resort = last_resort
        self._hurry = asyncio.Event()
        self._began = 0.0
        self._task: asyncio.Task[None] | None = None

    def signalled(self) -> None:
        """A signal: stop; the second one: at once."""
        if self._task is None:
            self.begin()
            return
        self._last_resort.within(CLOSING_SECONDS)
        self._hurry.set()
        if self._task.done():
            self._http.close_within(0)
        end_at_next_stop()

    def begin(self) -> None:
        """Stop; a second call does nothing."""
        if self._task is None:
            self._began = monotonic()
            self._last_resort.within(self._seconds + CLOSING_SECONDS)
            self._task = asyncio.create_task(self._stop(), name="stop")

    async def _stop(self) -> None:
        requests = self._server.requests
        count = len(requests)
        logger.info("stopping: %d requests in progress, up to %g s (SHUTDOWN_SECONDS)", count, self._seconds)
        self._notifier.send(
            STOPPING=1,
            STATUS=f"stopping: {count} requests in progress",
            EXTEND_TIMEOUT_USEC=int((self._seconds + CLOSING_SECONDS) * MICROSECONDS),
        )
        await self._drain()
        self._server.begin_to_stop()
        settled = asyncio.create_task(self._settled())
        hurry = asyncio.create_task(self._hurry.wait())
        left = self._began + self._seconds - monotonic()
        await asyncio.wait({settled, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not settled.done():
            requests.end()
            await asyncio.wait({settled}, timeout=LAST_ANSWERS)
        for task in (settled, hurry):
            task.cancel()
        await asyncio.gather(settled, hurry, return_exceptions=True)
        self._http.close_within(0 if self._hurry.is_set() else self._began + self._seconds - monotonic())

    async def _drain(self) -> None:
        """Take new work for DRAIN_SECONDS more, unready; not where there is no device to do it, nor after a second
        signal."""
        if self._drain_seconds and self._server.trouble is None:
            self._server.begin_to_drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), self._drain_seconds)

    async def _settled(self) -> None:
        """Whoever came before the stop is answered, and the batches are where they can be taken up."""
        await asyncio.gather(self._server.requests.none(), self._server.state.batches.suspend(), return_exceptions=True)

    def tell(self) -> None:
        """Log how it went."""
        if self._task is not None:
            ended = self._server.requests.ended
            outcome = f"{ended} requests were ended" if ended else "all answered"
            logger.info("stopped after %.1f s, %s", monotonic() - self._began, outcome)


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
    """Outside the event loop: a stop that was asked for is no failure."""
    for number in STOP:
        signal.signal(number, lambda number, frame: None)


def end_at_next_stop() -> None:
    """Leave the next signal to the system, which ends the process with it."""
    for number in STOP:
        signal.signal(number, signal.SIG_DFL)


def on_hangup(reload: Callable[[], None], stop: Callable[[], None]) -> None:
    """Handle SIGHUP: a request to read the settings again, or the sign that the server's terminal was closed.

    Does nothing under nohup, and on Windows, which has no such signal.
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


class LastResort:
    """Ends the process after a time, whatever hangs: a forward pass, a disk, a library's own threads."""

    def __init__(self, exit_code: Callable[[], int]) -> None:
        self._exit_code = exit_code
        self._timer: threading.Timer | None = None

    def within(self, seconds: float) -> None:
        """End the process in so many seconds from now; replaces an earlier time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        logger.error("the server did not come to its end in time; it is ended")
        leave(self._exit_code())


def leave(exit_code: int) -> None:
    """End the process now. Python's own end would wait for threads that cannot be ended."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
