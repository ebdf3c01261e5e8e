"""Request bodies before a byte of them is parsed.

How fast they must come, what they are decompressed to, and the memory that all of them together may take.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecmill.core.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    MalformedBody,
    Overloaded,
    RequestTimedOut,
    UnsupportedEncoding,
    VecmillError,
)
from vecmill.core.threads import WorkerThreads
from vecmill.http.dialects.registry import dialect_for
from vecmill.http.errors import refused
from vecmill.http.route import SHORTEST_TIMEOUT, client_of

BODIES_AT_A_TIME = 8  # of the largest size
# What one client may take of that. The rest is there for the others, whatever it does.
SHARE_OF_A_CLIENT = 0.5
# Bodies up to a sixteenth of the largest never wait for room, nor do more bytes than this of any other.
ALWAYS_ROOM = 65_536
ROOM_SECONDS = 5.0  # that a body waits for room
MOST_WAITING = 32  # bodies; more are refused at once
LOOK_EVERY = 0.1  # seconds between two looks for room
# A body that others wait for must come this fast, in bytes a second, but for pauses of so many seconds.
CROWDED_RATE, CROWDED_PAUSE = 65_536, 2.0
LEAST_RATE = 500  # bytes a second; Apache's, https://httpd.apache.org/docs/2.4/mod/mod_reqtimeout.html
STOPPING_PAUSE = 5.0  # seconds that a body may pause while the server stops
# A body is decompressed in pieces of so many bytes, and refused where it grows by more than this.
PIECE_BYTES = 262_144
MOST_GROWTH, GROWTH_FROM_BYTES = 200, 1_048_576
MOST_MEMBERS = 1000  # of one gzip file
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
JSON_TYPE = (b"content-type", b"application/json")
# What curl, and a browser's fetch, call a body that nobody gave a type.
UNTYPED = ("application/x-www-form-urlencoded", "text/plain")


class Bodies:
    """All bodies that are being read or worked on, and the room they take. Belongs to the event loop's thread."""

    def __init__(self, max_bytes: int, pause: float) -> None:
        """`max_bytes`: of one body; `pause`: seconds that it may stop coming."""
        self.max_bytes = max_bytes
        self.pause = pause
        self._room = BODIES_AT_A_TIME * max_bytes
        self._share = int(self._room * SHARE_OF_A_CLIENT)
        self._always = min(ALWAYS_ROOM, max_bytes // 16)
        self._taken: Counter[str] = Counter()
        """Bytes, by client."""
        self._total = 0
        self._all: set[Body] = set()
        self._waiting = 0

    def stop(self) -> None:
        """From now on a body may pause for STOPPING_PAUSE seconds at the most."""
        self.pause = min(self.pause, STOPPING_PAUSE)
        for body in self._all:
            body.hurry(self.pause)

    @contextmanager
    def beginning(self, body: Body) -> Iterator[None]:
        """One more body, for as long as the context lasts."""
        self._all.add(body)
        try:
            yield
        finally:
            self._all.discard(body)
            self._total -= body.room
            self._taken[body.client] -= body.room
            if not self._taken[body.client]:
                del self._taken[body.client]

    async def take(self, body: Body, room: int) -> None:
        """Have room for so many bytes of a body, or wait for it.

        Raises:
            BodyTooLarge: no body may be that large. Overloaded: there was none in time.
        """
        if room > self.max_bytes:
            raise too_large(self.max_bytes)
        more = room - body.room
        if more <= 0:
            return
        if room > self._always and not self._fits(body, more):
            await self._wait(body, more)
        body.room = room
        self._total += more
        self._taken[body.client] += more

    def _fits(self, body: Body, more: int) -> bool:
        return self._total + more <= self._room and self._taken[body.client] + more <= self._share

    async def _wait(self, body: Body, more: int) -> None:
        refusal = Overloaded("The server is temporarily overloaded: too many large requests are being read; try again.")
        if self._waiting >= MOST_WAITING:
            raise refusal
        self._waiting += 1
        until = monotonic() + ROOM_SECONDS
        try:
            while not self._fits(body, more):
                if monotonic() > until:
                    raise refusal
                self._end_slowest(None if self._total + more > self._room else body.client)
                await asyncio.sleep(LOOK_EVERY)
        finally:
            self._waiting -= 1

    def _end_slowest(self, client: str | None) -> None:
        """End the largest body that hardly comes while others wait for its room: of one client, or of any."""
        now = monotonic()
        slow = [body for body in self._all if body.hardly_comes(now) and client in (None, body.client)]
        if slow:
            max(slow, key=lambda body: body.room).end()


def too_large(max_bytes: int) -> BodyTooLarge:
    """The error for a body that is larger than `max_bytes`."""
    return BodyTooLarge(f"The request body is larger than {max_bytes} bytes (MAX_BODY_BYTES); split the request.")


class Body:
    """One body as it arrives."""

    def __init__(
        self,
        bodies: Bodies,
        scope: Scope,
        receive: Receive,
        decoder: Decoder | None,
        until: float | None,
        in_memory: bool,
    ) -> None:
        """`until`: when all of it must have come, by `monotonic`; `in_memory`: it takes room."""
        self.client = client_of(Request(scope))
        """Whose room it takes."""
        self.room = 0
        self._bodies = bodies
        self._receive = receive
        self._decoder = decoder
        self._until = until
        self._in_memory = in_memory
        declared = Headers(scope=scope).get("content-length", "")
        self._declared = int(declared) if declared.isdecimal() and decoder is None and in_memory else 0
        self._held = 0
        self._complete = False
        self._pause = bodies.pause
        """Seconds for which it may still pause."""
        self._comes_until = 0.0
        """The time from which on the body counts as too slow, if nothing more of it arrives until then."""
        self._reading: asyncio.Timeout | None = None
        self._ended = False

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            RequestTimedOut, DeadlineExceeded, BodyTooLarge, MalformedBody, Overloaded: in the code that reads the body;
                `http.errors` turns them into answers.
        """
        if self._complete:
            return await self._receive()
        if self._declared > self.room:
            await self._bodies.take(self, self._declared)
        if self._decoder is not None and self._decoder.more:
            message: Message = {"type": "http.request", "body": b"", "more_body": True}
        else:
            message = await self._arriving()
        if message["type"] == "http.request":
            if self._decoder is not None:
                message = await self._decoder.decode(message)
            self._complete = not message.get("more_body", False)
            await self._hold(len(message.get("body", b"")))
        return message

    async def _arriving(self) -> Message:
        began = monotonic()
        if not self._comes_until:
            self._comes_until = began + CROWDED_PAUSE
        left = inf if self._until is None else self._until - began
        try:
            async with asyncio.timeout(0 if self._ended else min(self._pause, left)) as self._reading:
                message = await self._receive()
        except TimeoutError:
            raise self._late(left < self._pause) from None
        finally:
            self._reading = None
        now, size = monotonic(), len(message.get("body", b""))
        self._pause = min(self._pause - (now - began) + size / LEAST_RATE, self._bodies.pause)
        self._comes_until = min(max(self._comes_until, now) + size / CROWDED_RATE, now + CROWDED_PAUSE)
        return message

    async def _hold(self, size: int) -> None:
        self._held += size
        if self._in_memory:
            await self._bodies.take(self, self._held)

    def hurry(self, pause: float) -> None:
        """From now on it may pause for so many seconds."""
        self._pause = min(self._pause, pause)
        if self._reading is not None and not self._reading.expired():
            when, latest = self._reading.when(), asyncio.get_running_loop().time() + self._pause
            self._reading.reschedule(latest if when is None else min(when, latest))

    def hardly_comes(self, now: float) -> bool:
        """Whether the body takes room and its client sends it too slowly."""
        return self._reading is not None and not self._ended and self.room > 0 and now > self._comes_until

    def end(self) -> None:
        """Wait for no more of it."""
        self._ended = True
        self.hurry(0)

    def _late(self, deadline: bool) -> VecmillError:
        if self._ended:
            return RequestTimedOut(
                "timeout: the request body came too slowly while others waited for its room; send it again, or smaller "
                "ones."
            )
        if deadline:
            return DeadlineExceeded(
                "timeout: the request's time was over before all of its body had come (X-Request-Timeout, "
                "REQUEST_TIMEOUT)."
            )
        return RequestTimedOut(
            f"timeout: the request body came to a stop before its end, or came with less than {LEAST_RATE} bytes a "
            f"second (BODY_TIMEOUT)."
        )


class Decoder:
    """A compressed body, decompressed as it comes (RFC 9110, section 8.4)."""

    def __init__(self, coding: str, threads: WorkerThreads, max_bytes: int) -> None:
        self._coding = coding
        self._threads = threads
        self._max_bytes = max_bytes
        self._inflate = None if coding == "deflate" else zlib.decompressobj(wbits=31)
        self._rest = b""
        """What has come and is not decompressed yet."""
        self._last = False
        """Nothing more will come."""
        self._taken = 0
        self._given = 0
        self._members = 1
        self.more = False
        """There is more to give before more must come."""

    async def decode(self, message: Message) -> Message:
        """The next piece of what it says.

        Raises:
            MalformedBody: it is not so compressed. BodyTooLarge: it is meant to do harm.
        """
        arrived = message.get("body", b"")
        self._rest += arrived
        self._taken += len(arrived)
        self._last = self._last or not message.get("more_body", False)
        size = len(self._rest) + self._given  # small bodies are not worth a thread
        try:
            piece = await self._threads.run_if_large(self._piece, size=size)
        except zlib.error:
            raise self._malformed("is not valid") from None
        self._given += len(piece)
        if self._given > max(GROWTH_FROM_BYTES, MOST_GROWTH * self._taken):
            raise BodyTooLarge(
                f"The request body decompresses to more than {MOST_GROWTH} times its size (Content-Encoding); send it "
                f"uncompressed."
            )
        done = self._last and not self.more
        if done and self._taken and not (self._inflate is not None and self._inflate.eof):
            raise self._malformed("breaks off before its end")
        return {"type": "http.request", "body": piece, "more_body": not done}

    def _piece(self) -> bytes:
        if self._inflate is None and not self._choose():
            return b""
        assert self._inflate is not None
        if self._inflate.eof:
            self._next_member()
        piece = self._inflate.decompress(self._rest, PIECE_BYTES)
        self._rest = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
        self.more = bool(self._rest) or (len(piece) == PIECE_BYTES and not self._inflate.eof)
        return piece

    def _choose(self) -> bool:
        """`deflate` is zlib's format, but some send what is in it without its frame; two bytes tell."""
        if len(self._rest) < 2:
            return False
        framed = self._rest[0] & 15 == zlib.DEFLATED and int.from_bytes(self._rest[:2], "big") % 31 == 0
        self._inflate = zlib.decompressobj(wbits=15 if framed else -15)
        return True

    def _next_member(self) -> None:
        """A gzip file may be several, one after another (RFC 1952, section 2.2)."""
        if not self._rest:
            return
        self._members += 1
        if self._coding == "deflate" or self._members > MOST_MEMBERS:
            raise self._malformed("goes on after its end")
        self._inflate = zlib.decompressobj(wbits=31)

    def _malformed(self, what: str) -> MalformedBody:
        return MalformedBody(f"The request body {what} as `Content-Encoding: {self._coding}`.")


class BodyLimit:
    """ASGI middleware: bodies within their limits.

    408 for one that does not come, 413 for one that is too large, 415 for one whose compression is not known here, 429
    when all bodies in memory together are too many.
    """

    def __init__(
        self,
        app: ASGIApp,
        bodies: Bodies,
        threads: WorkerThreads,
        request_timeout: float,
        not_in_memory: Collection[str] = (),
    ) -> None:
        """`not_in_memory`: paths whose bodies go to the disk piece by piece, and which have limits of their own."""
        self._app = app
        self._bodies = bodies
        self._threads = threads
        self._request_timeout = request_timeout
        self._not_in_memory = not_in_memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = self._body(scope, receive)
        except (BodyTooLarge, UnsupportedEncoding) as error:
            response = await refused(Request(scope), error)
            # The body is not read, so the connection cannot carry another request.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        with self._bodies.beginning(body):
            await self._app(scope, body.receive, send)

    def _body(self, scope: Scope, receive: Receive) -> Body:
        """The body, with whose headers the scope is made to agree."""
        in_memory = scope["path"] not in self._not_in_memory
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if in_memory and declared.isdecimal() and int(declared) > self._bodies.max_bytes:
            raise too_large(self._bodies.max_bytes)
        began = scope.setdefault("state", {}).setdefault("began", monotonic())
        until = began + min(self._request_timeout, _request_timeout(headers)) if in_memory else None
        decoder = self._decoder(headers)
        body = Body(self._bodies, scope, receive, decoder, until, in_memory)
        if decoder is not None:
            _drop(scope, b"content-encoding", b"content-length")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in UNTYPED and dialect_for(scope["path"], scope["method"]).any_content_type:
            _drop(scope, b"content-type")
            scope["headers"].append(JSON_TYPE)
        return body

    def _decoder(self, headers: Headers) -> Decoder | None:
        given = ",".join(headers.getlist("content-encoding")).lower()
        codings = [coding for part in given.split(",") if (coding := part.strip()) not in ("", "identity")]
        if not codings:
            return None
        if codings not in (["gzip"], ["x-gzip"], ["deflate"]):
            raise UnsupportedEncoding
        return Decoder(codings[0], self._threads, self._bodies.max_bytes)


def _request_timeout(headers: Headers) -> float:
    """Seconds of X-Request-Timeout; infinite without one, and for what `caller_of` refuses."""
    given = headers.get("x-request-timeout", "")
    seconds = float(given) if SECONDS.fullmatch(given) else inf
    return seconds if seconds >= SHORTEST_TIMEOUT else inf


def _drop(scope: Scope, *names: bytes) -> None:
    scope["headers"] = [field for field in scope["headers"] if field[0] not in names]
