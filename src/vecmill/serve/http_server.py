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
                # Whoever connects from this machine could call himself anybody.
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
        """What uvicorn does once `should_exit` is set."""
        # Later than ours, so that uvicorn cancels nothing.
        self.config.timeout_graceful_shutdown = ceil(self._seconds) + 1
        abort = asyncio.get_running_loop().call_later(self._seconds, self._abort)
        try:
            await super().shutdown(sockets)
        finally:
            abort.cancel()

    def _abort(self) -> None:
        self._end_requests()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
