"""A stamp on every request, and one line of log for it."""

from __future__ import annotations

import logging
import re
import secrets
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
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
