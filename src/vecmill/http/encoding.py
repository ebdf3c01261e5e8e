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
from numpy.typing import NDArray

from vecmill.core.errors import InvalidInput
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import EmbedResult, Matrix, ScoreResult, Vector
from vecmill.http.compression import COMPRESS_FROM_BYTES, Coding, Compressor, accepted_coding, field, offers, quality
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


async def vectors_response(
    request: Request,
    result: EmbedResult,
    build: Callable[..., object],
    formats: Sequence[EmbeddingFormat] = (FLOAT,),
    *,
    binary: BinaryDtype | None = None,
) -> Response:
    """`build` is given the rows in each format, as JSON values, and puts them into the dialect's body.

    Args:
        binary: raw rows of this type instead, see `binary_dtype`.

    Raises:
        InvalidInput: a value is beyond float16's range, where that is asked for.
    """
    embeddings = result.embeddings
    threads = services_of(request).threads
    if binary is not None:
        return await _binary_response(request, result, binary)
    size = round(embeddings.size * sum(form.characters for form in formats))
    coding = accepted_coding(field(request.headers, "accept-encoding"))
    # base64 of floats hardly compresses: a quarter less for several milliseconds more.
    if size < COMPRESS_FROM_BYTES or all(form.base64 for form in formats):
        coding = None
    headers = result_headers(request, result) | (coding.headers if coding else {})
    if size <= STREAM_FROM_BYTES:
        whole = partial(_whole, build, embeddings, formats, coding)
        return Response(await threads.run(whole, size=size), media_type="application/json", headers=headers)
    body = await threads.run(lambda: _StreamedBody.of(build, embeddings, formats), size=size)
    return StreamingResponse(_stream(threads, body, coding), media_type="application/json", headers=headers)


BINARY = "application/octet-stream"
JSON_RANGES = ("application/json", "application/*", "*/*")
"""What stands for JSON in `Accept`, the most specific first, which decides (RFC 9110, section 12.5.1)."""
BinaryDtype = Literal["float32", "float16"]
HALF_MAX = float(np.finfo(np.float16).max)
BINARY_DTYPES: Mapping[str, BinaryDtype] = {"float32": "float32", "float16": "float16"}


def binary_dtype(request: Request, formats: Sequence[EmbeddingFormat]) -> BinaryDtype | None:
    """The type of raw rows that `Accept` asks for; None where it does not ask for `application/octet-stream`.

    Raises:
        InvalidInput: it names another type, or the body asks for vectors in another format.
    """
    read: dict[str, tuple[float, bool, int, str]] = {}
    for place, offer in enumerate(offers(field(request.headers, "accept"))):
        media, *parts = (part.strip() for part in offer.split(";"))
        given = {name.rstrip(): value.lstrip() for name, _, value in (part.partition("=") for part in parts)}
        liked = quality(given.get("q", "1"))
        # Of those liked alike one that is named goes before a range, then the first.
        rank = (liked, not media.endswith("*"), -place, given.get("dtype", "float32").strip('"'))
        read[media] = max(read.get(media, rank), rank)
    raw = read.get(BINARY)
    json = next((read[media] for media in JSON_RANGES if media in read), None)
    if raw is None or raw[0] == 0 or (json is not None and json > raw):
        return None
    dtype = raw[-1]
    if any(form.dtype != "float" for form in formats):
        raise InvalidInput(f"Accept: {BINARY} gives floats: leave the format of vectors out of the body.")
    if dtype in BINARY_DTYPES:
        return BINARY_DTYPES[dtype]
    raise InvalidInput(f"Accept: {BINARY}; dtype={dtype[:20]} is not served: float32 or float16.")


async def _binary_response(request: Request, result: EmbedResult, dtype: BinaryDtype) -> Response:
    """The vectors one after another as little-endian numbers, without anything around: (n, d) -> n * d of them."""
    rows = result.embeddings

    def numbers() -> bytes:
        if dtype == "float32":
            return rows.astype("<f4", copy=False).tobytes()
        if rows.size and float(np.abs(rows).max()) > HALF_MAX:
            raise InvalidInput(f"A value is beyond the range of float16: send Accept: {BINARY}; dtype=float32.")
        return rows.astype("<f2").tobytes()

    body = await services_of(request).threads.run(numbers, size=rows.nbytes)
    shape = {"X-Embedding-Shape": f"{len(rows)},{rows.shape[1]}", "Vary": "Accept"}
    headers = result_headers(request, result) | shape
    return Response(body, media_type=f"{BINARY}; dtype={dtype}", headers=headers)


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
    build: Callable[..., object], embeddings: Matrix, formats: Sequence[EmbeddingFormat], coding: Coding | None
) -> bytes:
    body = whole_body(build, embeddings, formats)
    return coding.compress(body) if coding else body


async def _stream(threads: WorkerThreads, body: _StreamedBody, coding: Coding | None) -> AsyncIterator[bytes]:
    compressor = coding.compressor() if coding else None
    count = len(body.vectors)
    largest = body.embeddings.shape[1] * max(form.characters for form in body.formats)
    step = max(1, round(PIECE_BYTES / largest))
    for start in range(0, count, step):
        yield await threads.run(partial(_piece, body, start, min(start + step, count), compressor), size=PIECE_BYTES)
    yield compressor.compress(body.between[-1]) + compressor.flush() if compressor else body.between[-1]


def _piece(body: _StreamedBody, start: int, stop: int, compressor: Compressor | None) -> bytes:
    piece = b"".join(body.encode(start, stop))
    return compressor.compress(piece) if compressor else piece


async def json_response(
    request: Request, build: Callable[[], object], headers: Mapping[str, str], *, size: int
) -> Response:
    """Build, serialise and compress in a thread. `size` is about that of the body, in bytes."""
    coding = accepted_coding(field(request.headers, "accept-encoding"))
    serialise = partial(_serialise, build, coding)
    body, used = await services_of(request).threads.run(serialise, size=size)
    return Response(body, media_type="application/json", headers={**headers, **(used.headers if used else {})})


def _serialise(build: Callable[[], object], coding: Coding | None) -> tuple[bytes, Coding | None]:
    body = orjson.dumps(build())
    if coding and len(body) >= COMPRESS_FROM_BYTES:
        return coding.compress(body), coding
    return body, None


def result_headers(request: Request, result: EmbedResult | ScoreResult) -> dict[str, str]:
    """Times in milliseconds: TEI's, `Server-Timing`, and the rest of the pass that runs, by which routers choose. Then
    the note that goes with an answer some of whose inputs were cut."""
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
    seconds["x-rest-of-pass"] = services_of(request).inference.rest_of_pass
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
