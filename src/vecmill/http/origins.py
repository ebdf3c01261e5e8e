"""The origins of web pages that may call the server, and what their browsers ask before they let them.

Sources: https://fetch.spec.whatwg.org/#http-cors-protocol and https://wicg.github.io/private-network-access/
"""

from __future__ import annotations

import re
from collections.abc import Collection

from fastapi import Request
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from vecmill.core.errors import NotAllowed
from vecmill.http.errors import refused


class Origins:
    """What CORS_ORIGINS lists: origins, patterns of origins, or `*`."""

    def __init__(self, listed: Collection[str]) -> None:
        self._any = bool(listed)
        self.all = "*" in listed
        self.pattern = "|".join(_pattern(origin) for origin in listed if origin != "*") or "(?!)"
        self._compiled = re.compile(self.pattern)

    def __bool__(self) -> bool:
        """Whether any is listed."""
        return self._any

    def __contains__(self, origin: str) -> bool:
        return self.all or self._compiled.fullmatch(origin) is not None


def _pattern(listed: str) -> str:
    """`*` is any host, or any labels before a domain, or any port."""
    pattern = re.sub(r":\\\*$", "(:[0-9]+)?", re.escape(listed))
    pattern = re.sub(r"://\\\*$", r"://[^/\\s]+", pattern)
    return re.sub(r"://\\\*", r"://[^/:\\s]+", pattern)


def not_allowed(origin: str) -> NotAllowed:
    """The refusal of a page's request, with what would allow it."""
    if origin == "null":
        return NotAllowed(
            "This server does not answer web pages without an origin (files, sandboxed frames): open the page from a "
            "web server and add that one's origin to CORS_ORIGINS, or set CORS_ORIGINS=*, then restart the server."
        )
    return NotAllowed(
        f"This server does not answer web pages of {origin[:100]!r}: add that origin to CORS_ORIGINS and restart the "
        f"server."
    )


class Cors(CORSMiddleware):
    """ASGI middleware: Starlette's, which answers browsers before keys are asked for.

    A refusal says what would allow the page.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        super().__init__(
            app,
            allow_origins=["*"] if origins.all else [],
            allow_origin_regex=origins.pattern,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
            # A page on the internet may call a server in a private network; whether it may is said by its origin.
            allow_private_network=True,
        )
        self._allows_none = not origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
            origin = headers.get("origin", "")
            asks = origin and "access-control-request-method" in headers
            if asks and not self.is_allowed_origin(origin):
                response = await refused(Request(scope), not_allowed(origin))
                await response(scope, receive, send)
                return
        await (self.app if self._allows_none else super().__call__)(scope, receive, send)
