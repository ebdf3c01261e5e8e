"""Results as bytes: each vector as a JSON value, encoded and compressed off the event loop, without work for each float
in Python. And what all streams of events have in common.

A thread that serialises holds the interpreter's lock until it returns, so large results are encoded in pieces: in
between, the event loop gets its turn. They leave as they are encoded, so that no whole body is ever held."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, Literal, TypeAlias

import numpy as np
import orjson
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from isal import isal_zlib
from numpy.typing import NDArray

from vecmill.core.threads import WorkerThreads
from vecmill.core.types import EmbedResult, Matrix, ScoreResult, Vector
from vecmill.http.middleware import GZIP_FROM_BYTES, GZIP_LEVEL, accepts_gzip
from vecmill.http.services import services_of, shows_work_of_all

Dtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
Quantized: TypeAlias = NDArray[np.int8] | NDArray[np.uint8]

# How far int8 reaches, in standard deviations of a unit vector's values (1 / sqrt(dimensions)). A fixed scale, so that
# vectors of different requests can be compared; what is beyond it is clipped.
REACH = 8.0


@dataclass(frozen=True, slots=True)
class EmbeddingFormat:
    """How a vector is written."""

    dtype: Dtype = "float"
    base64: bool = False
    """The bytes in base64 (floats as little-endian float32) instead of a list of numbers."""

    @property
    def characters(self) -> float:
        """About how many each dimension takes."""
        per_number = {"float": 12.0, "int8": 4.0, "uint8": 4.0, "binary": 0.5, "ubinary": 0.5}
        per_byte = {"float": 6.0, "int8": 1.4, "uint8": 1.4, "binary": 0.2, "ubinary": 0.2}
        return (per_byte if self.base64 else per_number)[self.dtype]


FLOAT, BASE64 = EmbeddingFormat(), EmbeddingFormat(base64=True)


def encode(vector: Vector, form: EmbeddingFormat) -> bytes:
    """One vector as finished JSON."""
    values = vector.astype("<f4", copy=False) if form.dtype == "float" else quantize(vector, form.dtype)
    if form.base64:
        return b'"%b"' % base64.b64encode(values.tobytes())
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


def quantize(vector: Vector, dtype: Dtype) -> Quantized:
    """A unit vector of d dimensions with 8 bits or 1 bit for each: (d,) -> (d,), or (ceil(d / 8),) for binary.

    Binary is the sign, the first dimension in the highest bit, as Cohere, Voyage and sentence-transformers pack it:
    `ubinary` as it is, `binary` less 128. `int8` is value x 127 x sqrt(d) / 8, rounded, within -127..127; `uint8` is
    that plus 128.
    """
    if dtype in ("binary", "ubinary"):
        bits: Quantized = np.packbits(vector > 0)
        return bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    reach = min(1.0, REACH / sqrt(len(vector)))
    scaled: Vector = np.clip(np.rint(vector * (127 / reach)), -127, 127)
    return scaled.astype(np.int8) if dtype == "int8" else (scaled + 128).astype(np.uint8)


STREAM_FROM_BYTES = 1_048_576
PIECE_BYTES = 262_144
GZIP_WINDOW = 31  # zlib's largest window, with gzip's header and trailer around


async def vectors_response(
    request: Request,
    result: EmbedResult,
    build: Callable[..., object],
    formats: Sequence[EmbeddingFormat] = (FLOAT,),
) -> Response:
    """`build` is given the rows in each format, as JSON values, and puts them into the dialect's body."""
    embeddings = result.embeddings
    size = round(embeddings.size * sum(form.characters for form in formats))
    # base64 of floats hardly compresses: a quarter less for several milliseconds more.
    compressible = not all(form.base64 for form in formats)
    compress = compressible and accepts_gzip(request.headers.get("accept-encoding", ""))
    headers = result_headers(request, result) | (COMPRESSED if compress and size >= GZIP_FROM_BYTES else {})
    threads = services_of(request).threads
    if size <= STREAM_FROM_BYTES:
        whole = partial(_whole, build, embeddings, formats, compress and size >= GZIP_FROM_BYTES)
        return Response(await threads.run(whole, size=size), media_type="application/json", headers=headers)
    body = await threads.run(lambda: _StreamedBody.of(build, embeddings, formats), size=size)
    return StreamingResponse(_stream(threads, body, compress), media_type="application/json", headers=headers)


COMPRESSED = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}


@dataclass(frozen=True, slots=True)
class _StreamedBody:
    """A body whose vectors are not encoded yet."""

    embeddings: Matrix
    formats: Sequence[EmbeddingFormat]
    between: list[bytes]
    """What stands before, between and after the vectors; one more than there are."""
    vectors: list[tuple[int, int]]
    """Format and row of each."""

    @classmethod
    def of(cls, build: Callable[..., object], embeddings: Matrix, formats: Sequence[EmbeddingFormat]) -> _StreamedBody:
        mark = secrets.token_hex(16).encode()  # which no text of a client's can hold
        rows = [
            [orjson.Fragment(b'"%b%02d%08d"' % (mark, number, row)) for row in range(len(embeddings))]
            for number in range(len(formats))
        ]
        parts = re.split(rb'"%b(\d{2})(\d{8})"' % mark, orjson.dumps(build(*rows)))
        vectors = [(int(number), int(row)) for number, row in zip(parts[1::3], parts[2::3], strict=True)]
        return cls(embeddings, formats, parts[::3], vectors)

    def encode(self, start: int, stop: int) -> Iterator[bytes]:
        """The vectors from `start` on, each after what stands before it."""
        for before, (number, row) in zip(self.between[start:stop], self.vectors[start:stop], strict=True):
            yield before
            yield encode(self.embeddings[row], self.formats[number])


def whole_body(
    build: Callable[..., object], embeddings: Matrix, formats: Sequence[EmbeddingFormat] = (FLOAT,)
) -> bytes:
    """The body that `vectors_response` sends, in one piece."""
    rows = [[orjson.Fragment(encode(row, form)) for row in embeddings] for form in formats]
    return orjson.dumps(build(*rows))


def _whole(
    build: Callable[..., object], embeddings: Matrix, formats: Sequence[EmbeddingFormat], compress: bool
) -> bytes:
    body = whole_body(build, embeddings, formats)
    return isal_zlib.compress(body, GZIP_LEVEL, GZIP_WINDOW) if compress else body


async def _stream(threads: WorkerThreads, body: _StreamedBody, compress: bool) -> AsyncIterator[bytes]:
    compressor = isal_zlib.compressobj(GZIP_LEVEL, wbits=GZIP_WINDOW) if compress else None
    count = len(body.vectors)
    largest = body.embeddings.shape[1] * max(form.characters for form in body.formats)
    step = max(1, round(PIECE_BYTES / largest))
    for start in range(0, count, step):
        yield await threads.run(partial(_piece, body, start, min(start + step, count), compressor), size=PIECE_BYTES)
    yield compressor.compress(body.between[-1]) + compressor.flush() if compressor else body.between[-1]


def _piece(body: _StreamedBody, start: int, stop: int, compressor: isal_zlib.Compress | None) -> bytes:
    piece = b"".join(body.encode(start, stop))
    return compressor.compress(piece) if compressor else piece


async def json_response(
    request: Request, build: Callable[[], object], headers: Mapping[str, str], *, size: int
) -> Response:
    """Build, serialise and compress in a thread. `size` is about that of the body, in bytes."""
    compress = accepts_gzip(request.headers.get("accept-encoding", ""))
    serialise = partial(_serialise, build, compress)
    body, compressed = await services_of(request).threads.run(serialise, size=size)
    return Response(body, media_type="application/json", headers={**headers, **(COMPRESSED if compressed else {})})


def _serialise(build: Callable[[], object], compress: bool) -> tuple[bytes, bool]:
    body = orjson.dumps(build())
    if compress and len(body) >= GZIP_FROM_BYTES:
        return isal_zlib.compress(body, GZIP_LEVEL, GZIP_WINDOW), True
    return body, False


def result_headers(request: Request, result: EmbedResult | ScoreResult) -> dict[str, str]:
    """Times in milliseconds, TEI's and `Server-Timing`, and the note that goes with an answer some of whose inputs were
    cut."""
    timings = result.timings
    computed = timings.tokenize + timings.forward
    seconds = {"x-total-time": computed + timings.queue}
    stages = {"total": computed + timings.queue}
    shows_all = shows_work_of_all(request)
    if shows_all:
        stages = {"tokenize": timings.tokenize, "queue": timings.queue, "forward": timings.forward, **stages}
        seconds |= {
            "x-compute-time": computed,
            "x-tokenization-time": timings.tokenize,
            "x-queue-time": timings.queue,
            "x-inference-time": timings.forward,
        }
    headers = {name: f"{1000 * value:.2f}" for name, value in seconds.items()}
    headers["Server-Timing"] = ", ".join(f"{name};dur={1000 * value:.2f}" for name, value in stages.items())
    headers["x-compute-tokens"] = str(result.prompt_tokens)
    if shows_all or result.cached_tokens:  # else there may be more of them than the caller may know of
        headers["X-Cached-Tokens"] = str(result.cached_tokens)
    if isinstance(result, EmbedResult) and result.cached:
        headers["X-Cached-Inputs"] = str(len(result.cached))
    if result.truncated:
        headers["X-Truncated-Inputs"] = ",".join(map(str, result.truncated[:100]))
    return headers


EVENT_STREAM_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Server-sent events, without an end."}
}
"""For the API's document."""
RETRY_EVENT = b"retry: 2000\n\n"
"""What a stream begins with: after so many milliseconds its client connects again."""


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Events as they come.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    # nginx holds answers back otherwise.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
