"""One client's connection: HTTP/1.1 with limits and time-outs.

uvicorn's own protocols have neither. httptools parses the heads here, as it does in uvicorn's protocol of that name,
and answers are written by that protocol's own class; where a message ends is decided here, so that one request is read
at a time, whatever follows it.

Source: https://datatracker.ietf.org/doc/html/rfc9112
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from vecmill.core.errors import HeadTooLarge, MalformedRequest, Overloaded, RequestTimedOut, VecmillError, as_refusal
from vecmill.http.dialects.registry import shape_for
from vecmill.http.errors import error_response
from vecmill.serve.open_files import no_room_for

logger = logging.getLogger(__name__)

LARGEST_HEAD = 65_536
"""Bytes of a request line and its header fields."""
MOST_FIELDS = 128
HEAD_END = b"\r\n\r\n"
LINE_END = b"\r\n"
# What a chunked body may spend on sizes, extensions and trailers: so many bytes, and one for every two bytes of data.
CHUNK_OVERHEAD = 65_536
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,12})(?:[ \t]*;[^\r\n]*)?")
VERSIONS = ("1.0", "1.1")  # httptools also reads heads of 0.9 and 2.0
DIGITS = re.compile(rb"[0-9]{1,15}")
# A body that nobody wants any more is read to its end, so that the connection can go on, if there is no more left of it
# than this; otherwise the connection is closed.
WORTH_READING = 262_144
# Seconds to go on reading after the last answer: closing at once would reset the connection, and a client that still
# sends would lose the answer (RFC 9112, section 9.6).
LINGER = 5.0
SENT_TOGETHER = 65_536  # bytes of a body that are copied behind its head, rather than sent by themselves
WARN_EVERY = 10.0  # seconds
STOPPING = 1.0  # seconds for the rest of a head, and to linger, once the server stops


class _Head:
    """What httptools tells of a request's head."""

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.spare = False
        """Something follows that httptools does not take for a part of the head."""

    def on_url(self, target: bytes) -> None:
        self.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.fields) == MOST_FIELDS:
            raise HeadTooLarge(f"The request has more than {MOST_FIELDS} header fields; send fewer.")
        self.fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True

    def on_body(self, body: bytes) -> None:
        self.spare = True

    def values(self, name: bytes) -> list[bytes]:
        return [value for field, value in self.fields if field == name]


class _Sized:
    """A body of a known length."""

    def __init__(self, length: int) -> None:
        self.left = length

    @property
    def complete(self) -> bool:
        return self.left == 0

    def take(self, buffer: bytearray) -> bytes | bytearray:
        """Move what belongs to the body out of the buffer."""
        if len(buffer) <= self.left:
            self.left -= len(buffer)
            taken = bytes(buffer)
            buffer.clear()
            return taken
        taken = bytes(buffer[: self.left])
        del buffer[: self.left]
        self.left = 0
        return taken


class _Chunked:
    """A body in chunks (RFC 9112, section 7.1). Extensions and trailers are dropped."""

    def __init__(self) -> None:
        self.complete = False
        self.left = WORTH_READING + 1  # unknown
        self._in_chunk = 0
        """Bytes of the present chunk that are still to come, its line end included."""
        self._last = False
        """Trailers follow."""
        self._data = 0
        self._overhead = 0

    def take(self, buffer: bytearray) -> bytes | bytearray:
        """Move what has come of the body out of the buffer.

        Raises:
            MalformedRequest: it is no chunked body, or hardly anything but sizes.
        """
        data, at = bytearray(), 0
        while not self.complete:
            step = self._chunk(buffer, at, data) if self._in_chunk else self._line(buffer, at)
            if not step:
                break
            at += step
        del buffer[:at]
        return data

    def _chunk(self, buffer: bytearray, at: int, data: bytearray) -> int:
        """Take data, or the line end behind it; how many bytes that were."""
        if self._in_chunk > len(LINE_END):
            piece = buffer[at : at + self._in_chunk - len(LINE_END)]
            data += piece
            self._data += len(piece)
            self._in_chunk -= len(piece)
            return len(piece)
        if len(buffer) < at + len(LINE_END):
            return 0
        if not buffer.startswith(LINE_END, at):
            raise MalformedRequest("A chunk of the request body is not as long as it says.")
        self._in_chunk = 0
        return len(LINE_END)

    def _line(self, buffer: bytearray, at: int) -> int:
        """Take the line with a chunk's size, or a trailer; how many bytes that were."""
        end = buffer.find(LINE_END, at)
        waiting = len(buffer) - at if end < 0 else end - at
        if self._overhead + waiting > CHUNK_OVERHEAD + self._data // 2:
            raise MalformedRequest(
                "The chunks of the request body are too small, or their extensions and trailers too long: send larger "
                "chunks, or a Content-Length."
            )
        if end < 0:
            return 0
        line = bytes(buffer[at:end])
        self._overhead += len(line) + 2 * len(LINE_END)
        if self._last:
            self._read_trailer(line)
        else:
            self._read_size(line)
        return len(line) + len(LINE_END)

    def _read_size(self, line: bytes) -> None:
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise MalformedRequest("The request body is not in chunks as `Transfer-Encoding: chunked` says.")
        size = int(match[1], 16)
        self._in_chunk = size + len(LINE_END) if size else 0
        self._last = size == 0

    def _read_trailer(self, line: bytes) -> None:
        if b"\n" in line or b"\r" in line:
            raise MalformedRequest("The trailers of the request body are not valid.")
        self.complete = not line


class _Exchange(RequestResponseCycle):
    """One request and its answer."""

    connection: Connection
    fault: VecmillError | None = None
    """Why the rest of the body cannot be read; raised in the code that reads the body."""
    unread: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the rest of the body is more than is worth reading."""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and self.more_body:
            # A client that waits for `100 Continue` does not send the body after another status.
            self.keep_alive = self.keep_alive and not (self.waiting_for_100_continue or self.unread())
        if message["type"] == "http.response.start":
            self.connection.expect_head()
        await super().send(message)

    async def receive(self) -> Any:
        message = await super().receive()
        if self.fault is not None and message["type"] != "http.disconnect":
            raise self.fault
        return message

    async def send_500_response(self) -> None:
        """The answer where the application made none; uvicorn calls it while it handles what was raised."""
        error = sys.exception()
        refusal = as_refusal(error) if isinstance(error, Exception) else error
        if not isinstance(refusal, VecmillError):
            await super().send_500_response()
            return
        response = error_response(shape_for(self.scope["path"]), refusal)
        headers = [*response.raw_headers, (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self.send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})


class Connection(asyncio.Protocol):
    """Reads requests one by one, and starts the application for each. Belongs to the event loop's thread."""

    transport: asyncio.Transport
    _flow: FlowControl
    _warned_at = -inf

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        head_seconds: float,
        idle_seconds: float,
    ) -> None:
        """The first four are what uvicorn gives every protocol."""
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._head_seconds = head_seconds
        self._idle_seconds = idle_seconds
        self._buffer = bytearray()
        """What has come and is not read yet."""
        self._head = _Head()
        self._parser = httptools.HttpRequestParser(self._head)
        self._fed = 0
        """How much of the buffer the parser has."""
        self._began: float | None = None
        """When the first byte of the present request came."""
        self._body: _Sized | _Chunked | None = None
        """The present request's, as long as it has not come to its end."""
        self._exchange: _Exchange | None = None
        """The present one, or the last one."""
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._stopping = False
        self._closed = False
        """No request is read any more."""
        self._expects_head = False
        """What is written next is the head of an answer."""
        self._unsent = b""
        """The head of an answer, until its body is there or the event loop turns."""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._flow = FlowControl(self.transport)
        self._state.connections.add(cast(Any, self))
        self._server, self._client = get_local_addr(self.transport), get_remote_addr(self.transport)
        self._scheme = "https" if is_ssl(self.transport) else "http"
        self._wait(self._idle_seconds, self.close)
        if no_room_for(transport.get_extra_info("socket")):
            self._warn_of_files()
            self._refuse(
                Overloaded(
                    "The server has as many connections as it may open files (RLIMIT_NOFILE) and is temporarily "
                    "overloaded; close idle connections, or try again later."
                )
            )

    @classmethod
    def _warn_of_files(cls) -> None:
        """Now and then: there are many such connections at once."""
        if monotonic() - cls._warned_at >= WARN_EVERY:
            cls._warned_at = monotonic()
            logger.warning("connections are refused: this process has almost as many files open as it may")

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        exchange, body = self._exchange, self._body
        if isinstance(body, _Sized) and exchange is not None and not self._buffer and len(data) <= body.left:
            body.left -= len(data)  # the same as below, without a copy
            self._pass_on(data)
            return
        self._buffer += data
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._state.connections.discard(cast(Any, self))
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        if self._exchange is not None:
            self._exchange.disconnected = not self._exchange.response_complete
            self._exchange.message_event.set()
        self._flow.resume_writing()

    def pause_writing(self) -> None:
        self._flow.pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._flow.resume_writing()

    def _watch_writing(self, before: int) -> None:
        """End a connection whose client takes nothing of its answer for as long as an idle one is kept."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._stall = self._loop.call_later(self._idle_seconds, self._watch_writing, left)

    # What uvicorn calls when the server stops.

    def shutdown(self) -> None:
        """Take no further request; one whose head has begun is still answered."""
        self._stopping = True
        if self._closed:
            self._wait(STOPPING, self.transport.abort)
        elif self._exchange is not None and not self._exchange.response_complete:
            self._exchange.keep_alive = False
        elif self._began is not None:
            self._wait(STOPPING, self._head_late)
        else:
            self.close()

    # What an exchange takes for its transport.

    def expect_head(self) -> None:
        """Hold the next write, a head, back until its body follows, so that one system call sends both."""
        self._expects_head = True

    def write(self, data: bytes) -> None:
        if self._closed:
            return
        if self._expects_head:
            self._expects_head, self._unsent = False, data
            self._loop.call_soon(self._send_head)
        elif self._unsent and len(data) <= SENT_TOGETHER:
            head, self._unsent = self._unsent, b""
            self.transport.write(head + data)
        else:
            self._send_head()
            self.transport.write(data)

    def _send_head(self) -> None:
        if self._unsent and not self.transport.is_closing():
            self.transport.write(self._unsent)
        self._unsent = b""

    def is_closing(self) -> bool:
        return self._closed or self.transport.is_closing()

    def close(self) -> None:
        """Close once what was written is sent; where the client may still be sending, listen a little longer."""
        if self._closed:
            return
        self._send_head()
        self._closed = True
        if self._exchange is not None and not self._exchange.response_complete:
            self._exchange.disconnected = True
            self._exchange.message_event.set()
        if self._body is None and self._began is None and not self._buffer:
            self.transport.close()
            self._wait(self._idle_seconds, self.transport.abort)  # a client that does not take the rest
            return
        self._buffer.clear()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self._flow.resume_reading()
        self._wait(STOPPING if self._stopping else LINGER, self.transport.abort)

    # Requests.

    def _read(self) -> None:
        """Read on in what has come, up to the end of a request that is not answered yet."""
        while self._buffer and not self._closed:
            if self._body is not None:
                try:
                    self._pass_on(self._body.take(self._buffer))
                except MalformedRequest as error:
                    self._fail(error)
                if self._body is not None:
                    return
            elif self._exchange is not None and not self._exchange.response_complete:
                if len(self._buffer) > HIGH_WATER_LIMIT:
                    self._flow.pause_reading()
                return
            elif not self._read_head():
                return

    def _read_head(self) -> bool:
        """Whether a head has come to its end and its request has begun."""
        if self._began is None and not self._begin_head():
            return False
        end = self._buffer.find(HEAD_END, max(0, self._fed - len(HEAD_END) + 1))
        length = len(self._buffer) if end < 0 else end + len(HEAD_END)
        try:
            if length > LARGEST_HEAD:
                raise HeadTooLarge
            self._feed(bytes(self._buffer[self._fed : length]), complete=end >= 0)
            self._fed = length
            if end < 0:
                return False
            del self._buffer[:length]
            self._begin(self._head)
        except VecmillError as error:
            self._refuse(error)
            return False
        return True

    def _begin_head(self) -> bool:
        """Whether a request begins here; line ends before it are none of it (RFC 9112, section 2.2)."""
        if self._buffer[0] in LINE_END:
            self._buffer = self._buffer.lstrip(LINE_END)
            if not self._buffer:
                return False
        self._head = _Head()
        self._parser = httptools.HttpRequestParser(self._head)
        self._fed = 0
        self._began = monotonic()
        self._wait(STOPPING if self._stopping else self._head_seconds, self._head_late)
        return True

    def _feed(self, data: bytes, *, complete: bool) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # to what is not spoken here, so it is not done (RFC 9110, section 7.8)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, HeadTooLarge):
                raise error.__context__ from None
            raise MalformedRequest(_not_http(self._buffer, str(error))) from None
        if self._head.complete != complete or self._head.spare:
            raise MalformedRequest(_not_http(self._buffer, "its head has no proper end"))

    def _begin(self, head: _Head) -> None:
        """The head is there: start the application.

        Raises:
            MalformedRequest: it does not say where it ends, or what it is for.
        """
        version = self._parser.get_http_version()
        if version not in VERSIONS:
            raise MalformedRequest(f"HTTP/{version} is not spoken here: send HTTP/1.1.")
        body, (path, query) = _framing(head, version), _parts(head)
        self._stop_waiting()
        scope = {
            "type": "http",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self._server,
            "client": self._client,
            "scheme": self._scheme,
            "method": self._parser.get_method().decode("ascii"),
            "root_path": self._config.root_path,
            "path": self._config.root_path + unquote(path.decode("utf-8", "replace")),
            "raw_path": path,
            "query_string": query,
            "headers": head.fields,
            "state": {**self._app_state, "began": self._began},
        }
        self._began = None
        exchange = _Exchange(
            scope=cast(Any, scope),
            transport=cast(Any, self),
            flow=self._flow,
            logger=logger,
            access_logger=logger,
            access_log=False,
            default_headers=self._state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=any(value.lower() == b"100-continue" for value in head.values(b"expect")),
            keep_alive=version == "1.1" and not _asks_to_close(head) and not self._stopping,
            on_response=self._answered,
        )
        exchange.connection = self
        self._exchange = exchange
        self._body = body
        if body is None:
            exchange.more_body = False
            exchange.message_event.set()
        else:
            exchange.unread = lambda: body.left > WORTH_READING
        task = self._loop.create_task(exchange.run_asgi(self._config.loaded_app))
        task.add_done_callback(self._state.tasks.discard)
        self._state.tasks.add(task)

    def _pass_on(self, data: bytes | bytearray) -> None:
        """Give the application a piece of the body, and its end."""
        body, exchange = self._body, self._exchange
        assert body is not None  # whoever calls has looked
        assert exchange is not None
        if not exchange.response_complete:
            exchange.body += data
            if len(exchange.body) > HIGH_WATER_LIMIT:
                self._flow.pause_reading()
        if body.complete:
            self._body = None
            exchange.more_body = False
        if data or body.complete:
            exchange.message_event.set()
        if self._body is None and exchange.response_complete:
            self._next()

    def _fail(self, error: MalformedRequest) -> None:
        """Record that the rest of the body cannot be read; the code that reads the body answers."""
        exchange = self._exchange
        assert exchange is not None  # there is a body
        exchange.keep_alive = False
        exchange.fault = error
        exchange.message_event.set()
        self._buffer.clear()
        if exchange.response_started:
            self.close()

    def _answered(self) -> None:
        """The answer is written."""
        self._state.total_requests += 1
        if self._closed:
            return
        self._flow.resume_reading()
        if self._body is None:
            self._next()
        else:
            self._wait(LINGER, self.close)

    def _next(self) -> None:
        self._wait(self._idle_seconds, self.close)
        self._flow.resume_reading()
        if self._buffer:
            self._loop.call_soon(self._read)

    # Ends.

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self._loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_late(self) -> None:
        self._refuse(
            RequestTimedOut(
                f"timeout: the head of the request did not come to its end within {self._head_seconds:g} s "
                f"(HEAD_TIMEOUT)."
            )
        )

    def _refuse(self, error: VecmillError) -> None:
        """Answer a request that cannot be read with an error, and close the connection."""
        path = self._head.target.partition(b"?")[0].decode("ascii", "replace")
        response = error_response(shape_for(path), error)
        logger.info("request refused", extra={"status": response.status_code, "error": type(error).__name__})
        fields = [*self._state.default_headers, *response.raw_headers]
        head = b"".join(b"%b: %b\r\n" % field for field in fields if field[0].lower() != b"connection")
        self.transport.write(
            STATUS_LINE[response.status_code] + head + b"connection: close\r\n\r\n" + bytes(response.body)
        )
        self.close()


def _not_http(start: bytearray, reason: str) -> str:
    """What is wrong with a head; in other words where another protocol is known by it."""
    if start.startswith(b"\x16\x03"):
        return "This port speaks HTTP, not HTTPS: begin the address with http://."
    if start.startswith(b"PRI * HTTP/2.0"):
        return "This port speaks HTTP/1.1, and no HTTP/2."
    return f"The request is not valid HTTP/1.1: {reason}."


def _asks_to_close(head: _Head) -> bool:
    """Whether this is the connection's last request (RFC 9112, section 9.6).

    httptools knows that too, but has forgotten it by the end of a request without a body.
    """
    options = b",".join(head.values(b"connection")).split(b",")
    return any(option.strip().lower() == b"close" for option in options)


def _framing(head: _Head, version: str) -> _Sized | _Chunked | None:
    """How the body is delimited (RFC 9112, section 6.3); None where there is none.

    Raises:
        MalformedRequest: it says so twice, or in no way that is known here.
    """
    lengths, codings = head.values(b"content-length"), head.values(b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise MalformedRequest("Content-Length and Transfer-Encoding are more than one: send one of them, once.")
    if len(head.values(b"host")) > 1:
        raise MalformedRequest("Host is there more than once.")
    if codings:
        if codings[0].lower() != b"chunked" or version == "1.0":
            raise MalformedRequest("The only Transfer-Encoding that is taken is `chunked`, from HTTP/1.1 on.")
        return _Chunked()
    if not lengths:
        return None
    if not DIGITS.fullmatch(lengths[0]):
        raise MalformedRequest("Content-Length is not a number of bytes.")
    return _Sized(int(lengths[0])) if int(lengths[0]) else None


def _parts(head: _Head) -> tuple[bytes, bytes]:
    """Path and query of a request's target, in any of the forms of RFC 9112, section 3.2.

    The host of an absolute form takes the place of the Host field.

    Raises:
        MalformedRequest: it is none of them.
    """
    target = head.target
    if not target.startswith((b"/", b"*")):
        scheme, _, rest = target.partition(b"://")
        if scheme.lower() not in (b"http", b"https"):
            raise MalformedRequest("The request's target is neither a path nor an http address.")
        host = re.split(rb"[/?#]", rest, maxsplit=1)[0]
        target = rest[len(host) :]
        head.fields[:] = [(b"host", host), *(field for field in head.fields if field[0] != b"host")]
    path, _, query = target.partition(b"#")[0].partition(b"?")
    return path or b"/", query
