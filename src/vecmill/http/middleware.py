"""The small layers that every request passes.

The path in the routes' spelling, gzip, and the count of requests in progress: after a stop has begun they are waited
for, refused, or ended with an answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecmill.core.errors import ShuttingDown
from vecmill.http.compression import COMPRESS_FROM_BYTES, LEVEL, accepts_gzip, field
from vecmill.http.errors import refused

SLASHES = re.compile("/{2,}")
# The client's base URL ends with a prefix that the client also puts before its paths.
TWICE = re.compile(r"/(v1|v2|api)/\1(?=/|$)")


class _HeadSent(Exception):
    """Raised into an application that sends a body to a HEAD request, to stop it."""


class RequestLine:
    """ASGI middleware: paths without doubled, trailing or repeated parts; HEAD answered as GET, without the body.

    `way_to_root` of the request's state is a relative reference from the path as it was asked for to `/`: it also leads
    there where a proxy serves `/` below a path of its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = scope["path"]
        path = plain_path(asked)
        scope.setdefault("state", {})["way_to_root"] = "../" * (asked.count("/") - 1) or "./"
        if path != asked:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        with suppress(_HeadSent):
            await self._app({**scope, "method": "GET"}, receive, _head_only(send))


def plain_path(path: str) -> str:
    """The path that is meant: `//v1/embeddings/` and `/v1/v1/embeddings` are `/v1/embeddings`."""
    if "//" in path:
        path = SLASHES.sub("/", path)
    if path.endswith("/"):
        path = path.rstrip("/") or "/"
    return TWICE.sub(r"/\1", path, count=1) if TWICE.match(path) else path


def _head_only(send: Send) -> Send:
    """Passes on the head of an answer, and ends it there: a stream has no end of its own, and a file is long."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            raise _HeadSent

    return send_head


FILES = "/v1/files/"


class AcceptedGZip(GZipMiddleware):
    """Starlette's GZipMiddleware, used only where Accept-Encoding allows gzip: Starlette's own check ignores `q=0`."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, minimum_size=COMPRESS_FROM_BYTES, compresslevel=LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Files of batches may be gigabytes, and compressing happens in the event loop.
        fetched = scope["type"] == "http" and scope["method"] == "GET" and not scope["path"].startswith(FILES)
        if fetched and accepts_gzip(field(Headers(scope=scope), "accept-encoding")):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


REST_SECONDS = 1.0  # for the rest of a body that nobody wants any more


ENDLESS = frozenset({"/jobs/events", "/dashboard/events"})


@dataclass(eq=False, slots=True)
class Exchange:
    """One request and its answer."""

    task: asyncio.Task[Any]
    late: bool
    """It came after the stop had begun."""
    endless: bool = False
    """A stream of events, which ends when the stop begins: the stop need not wait for a client that does not read."""
    answering: bool = False
    """Its status is sent."""
    ended: bool = False
    """By the server, which could wait no longer."""


class InProgress:
    """Requests that have begun and not ended. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._all: set[Exchange] = set()
        self._waited_for = 0
        self._none = asyncio.Event()
        self._none.set()
        self.stopping = False
        self.ended = 0
        """Requests that got no answer of their own."""

    def __len__(self) -> int:
        """Those that the stop waits for: they came before it."""
        return self._waited_for

    @property
    def in_flight(self) -> int:
        """All of them, also those that came after the stop had begun."""
        return len(self._all)

    def stop(self) -> None:
        """From now on new work is refused."""
        self.stopping = True

    async def none(self) -> None:
        """Return once all that came before the stop have ended."""
        await self._none.wait()

    def end(self) -> None:
        """End all at once, with a 503 where nothing is sent yet."""
        for exchange in self._all:
            if not exchange.ended:
                exchange.ended = True
                exchange.task.cancel()
                self.ended += not (exchange.late or exchange.endless)

    @contextmanager
    def begun(self, *, endless: bool = False) -> Iterator[Exchange]:
        """One more, for as long as the context lasts."""
        task = asyncio.current_task()
        assert task is not None  # this is called by a coroutine
        exchange = Exchange(task, self.stopping, endless)
        self._all.add(exchange)
        self._count(exchange, 1)
        try:
            yield exchange
        finally:
            self._all.discard(exchange)
            self._count(exchange, -1)

    def _count(self, exchange: Exchange, sign: int) -> None:
        if not (exchange.late or exchange.endless):
            self._waited_for += sign
            if self._waited_for:
                self._none.clear()
            else:
                self._none.set()


class _RequestBody:
    """A request's body on its way, as far as it has been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False

    async def receive(self) -> Message:
        """The next message."""
        message = await self._receive()
        self._ended = self._ended or message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def rest(self) -> None:
        """Read what still comes, and drop it: a connection closed over it is reset, and its answer lost on the way."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REST_SECONDS):
                while not self._ended:
                    await self.receive()


class Draining:
    """ASGI middleware: every request is one of those in progress."""

    def __init__(self, app: ASGIApp, requests: InProgress) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._requests.begun(endless=scope["path"] in ENDLESS) as exchange:
            scope.setdefault("state", {})["late"] = exchange.late
            body = _RequestBody(receive)

            async def marking_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    exchange.answering = True
                    if self._requests.stopping:  # the client's next request finds another server, or the next process
                        MutableHeaders(scope=message)["Connection"] = "close"
                    if exchange.late or exchange.ended:
                        await body.rest()
                await send(message)

            try:
                await self._app(scope, body.receive, marking_send)
            except asyncio.CancelledError:
                if not exchange.ended:
                    raise
                exchange.task.uncancel()
                await self._answer(exchange, scope, body.receive, marking_send)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """What is half sent is cut: its client must not take it for the whole."""
        if not exchange.answering:
            error = ShuttingDown("503: the server stopped before it was done with this request; try again.")
            response = await refused(Request(scope, receive), error)
            await response(scope, receive, send)
