"""Requests as the routes know them, where clients write them in other ways."""

from __future__ import annotations

import re
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
