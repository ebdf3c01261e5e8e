"""The small layers that every request passes: a stamp and a line of log, its path in the routes' spelling, gzip."""

from __future__ import annotations

import logging
import re
import secrets
from contextlib import suppress
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecmill.http.errors import LOGGED_CHARACTERS

logger = logging.getLogger(__name__)

ACCEPTABLE = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestId:
    """ASGI middleware: answers with the client's `X-Request-ID`, or one of its own; logs at `debug`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if ACCEPTABLE.fullmatch(given) else secrets.token_hex(8)
        started = perf_counter()
        status = 0

        async def stamping_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                # Answers repeat what clients say; no browser may take one for a page.
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, stamping_send)
        finally:
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug(
                    "request",
                    extra={
                        "request": request_id,
                        "method": scope["method"],
                        "path": scope["path"][:LOGGED_CHARACTERS],
                        "status": status,
                        "key": scope.get("state", {}).get("api_key_name"),
                        "ms": round(1000 * (perf_counter() - started), 1),
                    },
                )


SLASHES = re.compile("/{2,}")
# A base address that ends with what the client puts before its paths.
TWICE = re.compile(r"/(v1|v2|api)/\1(?=/|$)")


class _HeadSent(Exception):
    """Ends whoever sends a body that nobody gets."""


class RequestLine:
    """ASGI middleware: paths without doubled, trailing or repeated parts; HEAD answered as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = plain_path(scope["path"])
        if path != scope["path"]:
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


GZIP_FROM_BYTES = 1024
# Digits compress about as well at 1 as at the highest level, in a fraction of the time.
GZIP_LEVEL = 1
FILES = "/v1/files/"


class AcceptedGZip(GZipMiddleware):
    """Starlette's middleware, which takes `gzip;q=0` for a yes, behind a reading of the header by its rules."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, minimum_size=GZIP_FROM_BYTES, compresslevel=GZIP_LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Files of batches may be gigabytes, and compressing happens in the event loop.
        fetched = scope["type"] == "http" and scope["method"] == "GET" and not scope["path"].startswith(FILES)
        if fetched and accepts_gzip(Headers(scope=scope).get("accept-encoding", "")):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header allows gzip (RFC 9110, section 12.5.3)."""
    for offer in accept_encoding.lower().split(","):
        coding, _, parameters = offer.partition(";")
        if coding.strip() in ("gzip", "*"):
            quality = parameters.strip().removeprefix("q=") or "1"
            return quality.strip("0.") != ""
    return False
