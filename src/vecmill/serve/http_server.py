"""uvicorn's server and its listening socket; the signals and the last seconds are ours."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import ceil

import uvicorn
from fastapi import FastAPI

from vecmill.config import HttpSettings
from vecmill.core.address import url_here
from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.serve.connection import Connection

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

        A second call leaves LAST_ANSWERS seconds from then on.
        """
        if self.should_exit:
            asyncio.get_running_loop().call_later(LAST_ANSWERS, self._abort)
        self._seconds = max(LAST_ANSWERS, seconds)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, but first serve the clients that have connected already.

        Connections that wait in the kernel are accepted, and requests on them are refused with an answer, which closes
        the connection. Those still open afterwards have sent nothing for QUIET_SECONDS.
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


# What may be otherwise at the next start: the port is free, the address is there, names can be looked up.
OBSTACLES = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, socket.EAI_AGAIN})
SO_ATTACH_FILTER, BPF_RET = 26, 0x06  # asm-generic/socket.h, linux/bpf_common.h
BACKLOG = 2048  # uvicorn's, which sets it again


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; they wait until somebody serves them.

    Raises:
        StartupError: HOST is no address, or this user may not have the port. StartupObstacle: somebody else has the
            port, or the address is not this machine's, which it may become (a network that is not up yet).
    """
    try:
        return _listening(host, port)
    except (OSError, UnicodeError) as error:
        later = isinstance(error, OSError) and error.errno in OBSTACLES
        reason = getattr(error, "strerror", None) or "no name or address"
        raise (StartupObstacle if later else StartupError)(
            f"HOST={host} PORT={port} cannot be bound ({reason}): {_cure(error)}."
        ) from None


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _cure(error: OSError | UnicodeError) -> str:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return "stop what uses it or set another PORT"
        case errno.EACCES:
            return "set a PORT from 1024 on"
    return "set HOST to an address of this machine"


def take_no_more(listener: socket.socket) -> None:
    """Have the kernel complete no further connection; those that it has completed still wait to be accepted.

    To close a socket resets those that wait, and under load there are always some. A filter that drops every packet
    is dropped with its socket; whoever connected meanwhile tries again a second later and is refused.
    Source: https://docs.kernel.org/networking/filter.html (struct sock_fprog, SO_ATTACH_FILTER)
    """
    if sys.platform != "linux":
        return
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RET, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(drop_all))
    with suppress(OSError):  # a kernel without filters
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def connected(listener: socket.socket) -> int:
    """How many connections wait to be accepted; 0 where the kernel does not tell.

    Source: https://man7.org/linux/man-pages/man7/tcp.7.html (TCP_INFO; of a listener tcpi_unacked is its queue)
    """
    if sys.platform != "linux":
        return 0
    try:
        (waiting,) = struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)
    except (OSError, struct.error):
        return 0
    return int(waiting)


def address_of(listener: socket.socket) -> str:
    """The URL to open on this machine."""
    host, port = listener.getsockname()[:2]
    return url_here(host, port)
