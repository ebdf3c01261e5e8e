"""Vectors to JSON bytes, and gzip where the client takes it: in a thread, off the event loop."""

from __future__ import annotations

import asyncio
import base64
import gzip
from collections.abc import Callable, Mapping
from typing import Literal

import orjson
from fastapi import Request, Response

from vecmill.core.types import Matrix
from vecmill.http.gzip import GZIP_FROM_BYTES, GZIP_LEVEL, accepts_gzip
from vecmill.http.services import services_of

EncodingFormat = Literal["float", "base64"]


def encode_rows(embeddings: Matrix, encoding_format: EncodingFormat) -> list[object]:
    """One JSON value for each row: the array itself, or base64 of its little-endian float32 bytes."""
    if encoding_format == "float":
        return list(embeddings)
    little_endian = embeddings.astype("<f4", copy=False)
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in little_endian]


async def json_response(
    request: Request, build: Callable[[], object], headers: Mapping[str, str] | None = None
) -> Response:
    """Build, serialise and compress in the thread pool. `build` may hold numpy arrays."""
    compress = accepts_gzip(request.headers.get("accept-encoding", ""))
    loop = asyncio.get_running_loop()
    body, compressed = await loop.run_in_executor(services_of(request).threads, _serialise, build, compress)
    response = Response(body, media_type="application/json", headers=dict(headers or {}))
    if compressed:
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
    return response


def _serialise(build: Callable[[], object], compress: bool) -> tuple[bytes, bool]:
    body = orjson.dumps(build(), option=orjson.OPT_SERIALIZE_NUMPY)
    if compress and len(body) >= GZIP_FROM_BYTES:
        return gzip.compress(body, GZIP_LEVEL, mtime=0), True
    return body, False
