"""gzip where the client takes it, for what is fetched; results are compressed in a thread, or not worth it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

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
