"""Results as bytes: encoded and compressed off the event loop, without work for each float in Python.

A thread that serialises holds the interpreter's lock until it returns, so large results are serialised row by row: in
between, the event loop gets its turn.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import orjson
from fastapi import Request, Response

from vecmill.core.types import EmbedResult, Matrix, RerankResult
from vecmill.http.gzip import GZIP_FROM_BYTES, GZIP_LEVEL, accepts_gzip
from vecmill.http.services import services_of

EncodingFormat = Literal["float", "base64"]

# Of a float32, in JSON with its comma and in base64.
FLOAT_CHARACTERS, BASE64_CHARACTERS = 12, 6


async def vectors_response(
    request: Request,
    result: EmbedResult,
    build: Callable[[Sequence[object]], object],
    encoding_format: EncodingFormat = "float",
) -> Response:
    """`build` puts the rows, each a JSON value, into the dialect's body."""
    embeddings = result.embeddings
    # base64 of floats hardly compresses: a quarter less for several milliseconds more.
    compressible = encoding_format == "float"
    return await json_response(
        request,
        lambda: build(encode_rows(embeddings, encoding_format)),
        result_headers(result),
        size=embeddings.size * (FLOAT_CHARACTERS if compressible else BASE64_CHARACTERS),
        compressible=compressible,
    )


async def json_response(
    request: Request,
    build: Callable[[], object],
    headers: Mapping[str, str],
    *,
    size: int,
    compressible: bool = True,
) -> Response:
    """Build, serialise and compress in a thread. `size` is about that of the body, in bytes."""
    compress = compressible and accepts_gzip(request.headers.get("accept-encoding", ""))
    serialise = partial(_serialise, build, compress)
    body, compressed = await services_of(request).threads.run(serialise, size=size)
    response = Response(body, media_type="application/json", headers=dict(headers))
    if compressed:
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
    return response


def result_headers(result: EmbedResult | RerankResult) -> dict[str, str]:
    """TEI's times in milliseconds, and the note that goes with an answer some of whose inputs were cut."""
    timings = result.timings
    seconds = {
        "x-tokenization-time": timings.tokenize,
        "x-queue-time": timings.queue,
        "x-inference-time": timings.infer,
    }
    headers = {name: f"{1000 * value:.2f}" for name, value in seconds.items()}
    if result.truncated:
        headers["X-Truncated-Inputs"] = ",".join(map(str, result.truncated[:100]))
    return headers


def encode_rows(embeddings: Matrix, encoding_format: EncodingFormat) -> list[object]:
    """Each row as finished JSON: a list of floats, or base64 of its little-endian float32 bytes."""
    if encoding_format == "float":
        return [orjson.Fragment(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)) for row in embeddings]
    little_endian = embeddings.astype("<f4", copy=False)
    return [orjson.Fragment(b'"%b"' % base64.b64encode(row.tobytes())) for row in little_endian]


def _serialise(build: Callable[[], object], compress: bool) -> tuple[bytes, bool]:
    body = orjson.dumps(build())
    if compress and len(body) >= GZIP_FROM_BYTES:
        return gzip.compress(body, GZIP_LEVEL, mtime=0), True
    return body, False
