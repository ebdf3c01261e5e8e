"""One server's process from its socket to its exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from vecmill.app import Server, create_app
from vecmill.config import Settings, load_settings
from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.core.threads import LastingThreads
from vecmill.http.access import is_loopback
from vecmill.serve.http_server import LAST_ANSWERS, HttpServer, address_of, listen
from vecmill.serve.open_files import allow_many_files
from vecmill.serve.reloading import Reloading, warn_of_readable_keys
from vecmill.serve.start_log import announce
from vecmill.serve.stopping import STOP, LastResort, Stopping, ignore_stops, leave, on_hangup, on_signal
from vecmill.serve.systemd import Notifier, SystemdStatus, feed_watchdog
from vecmill.telemetry.logs import configure_logging

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger(__name__)

DISK_THREADS = 16
"""Of `asyncio.to_thread`, which wait for the disk and the driver."""
WRONG_SETTINGS = 2
"""The exit code where no restart would help; as for an unknown option."""


def run_server(settings: Settings, reread: Callable[[], Settings] = load_settings, remarks: Sequence[str] = ()) -> int:
    """Serve until stopped; the process's exit code.

    0; 1 where the server could not serve and a restart may find it otherwise; 2 where its settings are wrong.

    `reread` gives the settings as they are when SIGHUP comes. `remarks`: warnings for the log.
    """
    configure_logging(settings.log.log_format, settings.log.log_level, settings.http.replica)
    for remark in remarks:
        logger.warning(remark)
    allow_many_files()
    notifier = Notifier(os.environ)
    try:
        listener = listen(settings.http.host, settings.http.port)
    except StartupError as error:
        logger.error(error.message)
        return _code_of(misconfigured=not isinstance(error, StartupObstacle))
    process = _Process(settings, reread, listener, notifier)
    ignore_stops()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if sys.platform != "win32":  # asyncio's own loop takes none but the standard library's
            runner.get_loop().set_default_executor(LastingThreads(DISK_THREADS, "asyncio"))
        runner.run(process.run())
    ignore_stops()
    return process.exit_code()


class _Process:
    """The parts that only a process has, put together."""

    def __init__(
        self, settings: Settings, reread: Callable[[], Settings], listener: socket.socket, notifier: Notifier
    ) -> None:
        self._settings = settings
        self._reread = reread
        self._listener = listener
        self._notifier = notifier
        self._failures: list[str] = []
        self._server: Server | None = None
        self._last_resort = LastResort(self.exit_code)
        self._stopping: Stopping | None = None

    def exit_code(self) -> int:
        """As of `run_server`."""
        if not self._failures:
            return 0
        return _code_of(misconfigured=self._server is not None and self._server.misconfigured)

    async def run(self) -> None:
        """Serve until stopped."""
        address = address_of(self._listener)
        app = create_app(_with_port(self._settings, self._listener), self._on_failure, exclude_from_collections)
        server: Server = app.state.server
        self._server = server
        server.health.listen(SystemdStatus(self._notifier, address).changed)
        http = HttpServer(app, self._settings.http, server.requests.end)
        stopping = self._stopping = Stopping(server, http, self._settings.http, self._notifier, self._last_resort)
        reloading = Reloading(server, self._settings, self._reread, self._notifier)
        for number in STOP:
            on_signal(number, stopping.signalled)
        on_hangup(reloading.ask, stopping.signalled)
        self._warn()
        await _beside(
            http.serve(sockets=[self._listener]),
            announce(server.services, address),
            reloading.run(),
            feed_watchdog(self._notifier, lambda: server.trouble),
        )
        self._tell()
        if server.busy:
            leave(self.exit_code())

    def _warn(self) -> None:
        access = self._settings.access
        if not is_loopback(self._settings.http.host) and not access.api_key:
            logger.warning(
                "HOST=%s without API_KEY: everyone who reaches this address may use the server%s",
                self._settings.http.host,
                "" if access.allowed_hosts else "; by a public name only once that is in ALLOWED_HOSTS",
            )
        warn_of_readable_keys(access)

    def _on_failure(self, reason: str) -> None:
        gc.enable()
        self._failures.append(reason)
        # A supervisor can restart the process, not a thread in it. Whoever is just sending a request is told why first.
        if self._settings.http.exit_on_failure and self._stopping is not None:
            asyncio.get_running_loop().call_later(LAST_ANSWERS, self._stopping.begin)

    def _tell(self) -> None:
        if self._stopping is not None:
            self._stopping.tell()
        for reason in self._failures:
            logger.error(reason)


def _with_port(settings: Settings, listener: socket.socket) -> Settings:
    """With the port that is bound where PORT=0 left it open: replicas of one machine are told apart by it."""
    return replace(settings, http=settings.http.model_copy(update={"port": listener.getsockname()[1]}))


def _code_of(*, misconfigured: bool) -> int:
    """The exit code of a failure: systemd's unit does not restart a process that ended with WRONG_SETTINGS."""
    return WRONG_SETTINGS if misconfigured else 1


async def _beside(main: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]) -> None:
    """Await `main` while `others` run beside it; cancel those when it ends."""
    tasks = [asyncio.create_task(other) for other in others]
    try:
        await main
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def exclude_from_collections() -> None:
    """Exclude all present objects, most of them modules, from garbage collections, of which there were none so far.

    A collection that goes through them takes a quarter of a second, in which no request is answered.
    """
    gc.freeze()
    # Python puts a full collection off until a quarter as many objects are new as the last one left: without this one,
    # which finds nothing, that would be a quarter of those just excluded, tens of megabytes of garbage.
    gc.collect()
    gc.enable()
