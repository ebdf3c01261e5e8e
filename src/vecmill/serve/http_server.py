"""uvicorn's server, whose signals and last seconds are ours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil

import uvicorn
from fastapi import FastAPI

from vecmill.config import HttpSettings
from vecmill.serve.connection import Connection
from vecmill.serve.listener import connected, take_no_more

QUIET_SECONDS = 0.75  # of silence on a connection, in which its client would have sent its next request
LOOK_SECONDS = 0.02
LAST_ANSWERS = 1.0
"""Seconds for clients to take what was sent to them, when there is no time left for more."""


class HttpServer(uvicorn.Server):
    """Listens until `close_within` is called. Belongs to the event loop's thread."""

    def __init__(self, app: FastAPI, settings: HttpSettings, end_requests: Callable[[], None]) -> None:
        """`end_requests` ends those that are still in progress when there is no time left."""
        protocol = partial(Connection, head_seconds=settings.head_timeout, idle_seconds=settings.idle_timeout)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]  # it is only called
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                # Whoever connects from this machine could call himself anybody: TRUSTED_PROXIES says who may.
                proxy_headers=False,
            )
        )
        self._end_requests = end_requests
        self._seconds = LAST_ANSWERS

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    def close_within(self, seconds: float) -> None:
        """Close the listener and the idle connections, and the others once they have taken what was sent to them.

        Called again, it may take LAST_ANSWERS from then on, whatever was said before.
        """
        if self.should_exit:
            asyncio.get_running_loop().call_later(LAST_ANSWERS, self._abort)
        self._seconds = max(LAST_ANSWERS, seconds)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does once `should_exit` is set, after nobody is left who could be cut off.

        Whoever has connected is accepted, and whoever sends a request meanwhile gets its refusal, which ends that
        connection. What is still open after that has been silent.
        """
        # Later than ours, so that uvicorn cancels nothing.
        self.config.timeout_graceful_shutdown = ceil(self._seconds) + 1
        abort = asyncio.get_running_loop().call_later(self._seconds, self._abort)
        try:
            await self._take_what_has_come(sockets or [])
            await super().shutdown(sockets)
        finally:
            abort.cancel()

    async def _take_what_has_come(self, sockets: list[socket.socket]) -> None:
        for listener in sockets:
            take_no_more(listener)
        # The event loop accepts one connection in each turn.
        await self._wait(lambda: not any(map(connected, sockets)), self._seconds / 2)
        for server in self.servers:
            server.close()
        await self._wait(lambda: not self.server_state.connections, min(QUIET_SECONDS, self._seconds / 2))

    @staticmethod
    async def _wait(done: Callable[[], bool], seconds: float) -> None:
        for _ in range(ceil(seconds / LOOK_SECONDS)):
            await asyncio.sleep(LOOK_SECONDS)
            if done():
                return

    def _abort(self) -> None:
        self._end_requests()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
