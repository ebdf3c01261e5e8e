"""The requests in progress: counted, and after the stop has begun waited for, refused, or ended with an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecmill.core.errors import NotAllowed, ShuttingDown
from vecmill.http.errors import refused

REST_SECONDS = 1.0  # for the rest of a body that nobody wants any more


@dataclass(eq=False, slots=True)
class Exchange:
    """One request and its answer."""

    task: asyncio.Task[Any]
    late: bool
    """It came after the stop had begun."""
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
                self.ended += not exchange.late

    @contextmanager
    def begun(self) -> Iterator[Exchange]:
        """One more, for as long as the context lasts."""
        task = asyncio.current_task()
        assert task is not None  # this is called by a coroutine
        exchange = Exchange(task, self.stopping)
        self._all.add(exchange)
        self._count(exchange, 1)
        try:
            yield exchange
        finally:
            self._all.discard(exchange)
            self._count(exchange, -1)

    def _count(self, exchange: Exchange, sign: int) -> None:
        if not exchange.late:
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
        with self._requests.begun() as exchange:
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


def check_new_work(request: Request) -> None:
    """Refuse new work once the server is stopping, and from a key that is not for it.

    Raises:
        ShuttingDown, NotAllowed.
    """
    if getattr(request.state, "late", False):
        raise ShuttingDown
    if not getattr(request.state, "may_use", True):
        raise NotAllowed("This API key lacks the scope `use`, which work needs: send another, or give it that scope.")


async def _new_work(request: Request) -> None:
    check_new_work(request)


NewWork = Annotated[None, Depends(_new_work)]
"""A parameter of every route that takes work. What reads, reports or cancels is answered to the end."""
