"""A bound on the memory that request bodies take, before a byte of them is parsed."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecmill.core.errors import BodyTooLarge, Overloaded
from vecmill.http.error_shapes import shape_for
from vecmill.http.errors import error_response

BODIES_AT_A_TIME = 8  # of the largest size


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, 429 when all bodies in memory together are too many."""

    def __init__(self, app: ASGIApp, max_bytes: int, not_in_memory: Collection[str] = ()) -> None:
        """`not_in_memory`: paths whose bodies go to the disk piece by piece, and which have limits of their own."""
        self._app = app
        self._max_bytes = max_bytes
        self._not_in_memory = not_in_memory
        self._total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._not_in_memory:
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            response = error_response(shape_for(scope["path"], scope["method"]), self._too_large())
            # The body is not read, so the connection cannot carry another request.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        held = 0

        async def counting_receive() -> Message:
            """Raises into whoever reads the body; the table of errors answers."""
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._total += size
            self._check(held)
            return message

        try:
            await self._app(scope, counting_receive, send)
        finally:
            self._total -= held

    def _check(self, held: int) -> None:
        if held > self._max_bytes:
            raise self._too_large()
        if self._total > BODIES_AT_A_TIME * self._max_bytes:
            raise Overloaded("The server is temporarily overloaded: too many large requests are being read.")

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The request body is larger than {self._max_bytes} bytes (MAX_BODY_BYTES); split the request."
        )
