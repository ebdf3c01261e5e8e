"""Requests made up by a grammar of HTTP/1.1 and of what goes wrong with it, in pieces, on many connections at once.

Each connection gets answers in HTTP, none of which is the server's fault, or is closed; then the next one is served.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from tests.faults.service import Service
from tests.hostile.wire import answer_to, request

PATIENCE = 15.0  # seconds until a connection must have ended; a silent one ends after two
AT_ONCE = 60
NIGHTLY_SECONDS = 120
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-4][0-9][0-9]) [^\r\n]*\r\n")

METHODS = (
    b"GET",
    b"POST",
    b"POST",
    b"POST",
    b"HEAD",
    b"OPTIONS",
    b"PUT",
    b"DELETE",
    b"get",
    b"PO ST",
    b"",
    b"\0",
    b"X" * 300,
)
TARGETS = (
    *(
        b"/v1/embeddings",
        b"/v1/embeddings",
        b"/embed",
        b"/health",
        b"/rerank",
        b"/nowhere",
        b"/",
        b"*",
        b"",
        b"//",
        b"/%00",
    ),
    *(
        b"/%ff%fe",
        b"/v1/files/%2e%2e%2f",
        b"http://localhost/health",
        b"http:///",
        b"/a b",
        b"/\xff",
        b"/health?a=%zz&b#c",
    ),
    *(b"/v1/models/\xc3\xa9", b"/" + b"a" * 5000, b"/jobs/%F0%9F%98%80", b"http://[::1/health", b"?"),
)
VERSIONS = (b"HTTP/1.1",) * 8 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.11", b"http/1.1", b"HTTP/9", b"", b"HTTP/1.1 ")
BODIES = (
    *(b'{"input":"x"}', b'{"inputs":["a","b"]}', b"", b"{", b"[]", b"\0" * 50, b'{"query":"q","texts":["a"]}'),
    *(b'{"input":"' + b"word " * 400 + b'"}', b"GET /health HTTP/1.1\r\n\r\n", b"\xff\xfe"),
)
LINE_ENDS = (b"\r\n",) * 12 + (b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n", b"\0\r\n")
FIELDS = (
    *(b"Accept: */*", b"Accept-Encoding: gzip;q=nan, zstd", b"Connection: close", b"Connection: keep-alive, Upgrade"),
    *(
        b"Content-Type: application/json",
        b"Content-Type: \xff",
        b"Content-Type: multipart/form-data; boundary=" + b"x" * 200,
    ),
    *(
        b"Content-Encoding: gzip",
        b"Content-Encoding: deflate",
        b"Content-Encoding: zstd",
        b"Expect: 100-continue",
        b"Expect: x",
    ),
    *(b"Upgrade: h2c", b"X-Request-Timeout: 5e-324", b"X-Request-Timeout: 0.0001", b"X-Request-Timeout: 1e309"),
    *(
        b"X-Job-ID: \xf0\x9f\x98\x80",
        b"Authorization: Bearer",
        b"Authorization: Basic \xff",
        b"Origin: null",
        b"Cookie: a=b",
    ),
    *(
        b"Origin: http://[",
        b"Host: localhost",
        b"Host:",
        b"Host: a, b",
        b"Host: [::1",
        b"Range: bytes=9-1",
        b"If-None-Match: *",
    ),
    *(
        b"traceparent: 00-\0",
        b"traceparent: 00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-01",
        b"X-Request-ID: " + b"a" * 3000,
    ),
    *(
        b"X: a\r\n folded",
        b"X: a\r\n\tfolded",
        b" X: led",
        b"X : a",
        b": a",
        b"X",
        b"X:",
        b"X: \0",
        b"X:\x0b",
        b"\xc3\xa9: a",
    ),
    *(
        b"TE: trailers",
        b"Trailer: X",
        b"Transfer-Encoding: identity",
        b"Priority: u=9",
        b"X-Forwarded-For: ::::",
        b"Forwarded: for",
    ),
    *(
        b"Last-Event-ID: \xff",
        b"Accept: application/octet-stream;dtype=x",
        b"X-Priority: " + b"9" * 5000,
        b"Y: " + b"b" * 9000,
    ),
)
LENGTHS = (
    b"0",
    b"1",
    b"-1",
    b"+5",
    b"5,5",
    b"5 5",
    b"0x5",
    b"99999999999999999999",
    b"",
    b"\xb2",
    b"1e3",
    b" 5 ",
    b"00005",
)
SIZES = (b"g", b"-1", b"+5", b"ffffffffffffffff", b"", b"0x5", b"5 ;a", b"5;a=\n", b"00000005", b"5\0", b"99999999")


@dataclass(frozen=True)
class Sent:
    """What one connection sends."""

    pieces: tuple[bytes, ...]
    pause: float
    """Between them, in seconds."""
    closes: bool
    """Whether it says that nothing follows."""


def a_connection(source: random.Random) -> Sent:
    whole = b"".join(a_request(source) for _ in range(source.choice((1, 1, 1, 2, 4))))
    if source.random() < 0.1:
        whole = whole[: source.randint(0, len(whole))]
    if source.random() < 0.1 and whole:
        place = source.randrange(len(whole))
        whole = whole[:place] + bytes([source.randrange(256)]) + whole[place + 1 :]
    cuts = sorted({source.randint(0, len(whole)) for _ in range(source.choice((0, 0, 1, 3, 20)))})
    pieces = tuple(whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True))
    return Sent(pieces, source.choice((0, 0, 0.001, 0.02)), source.random() < 0.6)


def a_request(source: random.Random) -> bytes:
    body = source.choice(BODIES)
    framing, content = framed(body, source)
    count = source.choice((0, 1, 1, 2, 3, 8, 140))
    fields = [b"Host: localhost"] * (source.random() < 0.9) + source.choices(FIELDS, k=count) + framing
    if source.random() < 0.3:
        source.shuffle(fields)
    first = b" ".join((source.choice(METHODS), source.choice(TARGETS), source.choice(VERSIONS)))
    if source.random() < 0.7:  # most of it is right, so that what is wrong is reached
        first = source.choice((b"POST /v1/embeddings", b"POST /embed", b"GET /health", b"POST /rerank")) + b" HTTP/1.1"
    odd = source.random() < 0.2
    lines = [line + (source.choice(LINE_ENDS) if odd else b"\r\n") for line in (first, *fields, b"")]
    return b"".join(lines) + content


def framed(body: bytes, source: random.Random) -> tuple[list[bytes], bytes]:
    """The fields that say where a body ends, and what is sent as it."""
    length, chunked = b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked"
    match source.randrange(10):
        case 0 | 1 | 2:
            return [length], body
        case 3 | 4:
            return [chunked], chunks(body, source, broken=False)
        case 5:
            return [chunked], chunks(body, source, broken=True)
        case 6:
            return [b"Content-Length: " + source.choice(LENGTHS)], body
        case 7:
            return source.choice(([length, length], [length, chunked], [chunked, chunked], [chunked, length])), body
        case 8:
            return [
                source.choice(
                    (b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: CHUNKED")
                )
            ], chunks(body, source, broken=False)
        case _:
            return [], b""


def chunks(body: bytes, source: random.Random, *, broken: bool) -> bytes:
    size = source.choice((1, 2, 5, 1000))
    parts = []
    for start in range(0, len(body), size):
        part = body[start : start + size]
        named = source.choice(SIZES) if broken and source.random() < 0.4 else b"%x" % len(part)
        parts.append(named + source.choice((b"", b"", b";a=b", b";" + b"x" * 50)) + b"\r\n" + part + b"\r\n")
    end = source.choice((b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"000\r\n\r\n"))
    return b"".join(parts) + (source.choice((end, b"0\r\n", b"", b"0\n\n", b"\r\n")) if broken else end)


async def exchange(url: str, sent: Sent) -> bytes:
    """All that comes back until the server closes. TimeoutError: it does not."""
    parts = urlsplit(url)
    received = b""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            for piece in sent.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(sent.pause)
            if sent.closes:
                await asyncio.sleep(0.2)
                writer.write_eof()
            while data := await reader.read(1 << 16):
                received += data
        except ConnectionError:  # closed while something was still on its way
            pass
        finally:
            writer.close()
    return received


def statuses(received: bytes) -> Iterator[int]:
    """Of each answer. AssertionError: something else came than answers in HTTP without the server's own failures."""
    while received:
        match = STATUS_LINE.match(received)
        assert match, received[:300]
        status = int(match[1])
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, received[:300]
        yield status
        following = [found.start() for found in re.finditer(rb"HTTP/1\.1 [1-9]", rest)]
        length = re.search(rb"\r\ncontent-length: ([0-9]+)", head.lower())
        size = int(length[1]) if length and status != 100 else 0
        if following and following[0] == 0:  # of HEAD
            size = 0
        received = rest[size:]
        if not length and status != 100:  # in chunks: what is next is found by its first line
            received = rest[following[0] :] if following else b""


async def check_many(url: str, seed: int) -> set[int]:
    """The statuses that there were."""
    source = random.Random(seed)
    connections = [a_connection(source) for _ in range(AT_ONCE)]
    results = await asyncio.gather(*(exchange(url, sent) for sent in connections), return_exceptions=True)
    seen = set[int]()
    for sent, result in zip(connections, results, strict=True):
        try:
            if isinstance(result, BaseException):
                raise result
            seen |= {*statuses(result)}
        except BaseException as error:
            error.add_note(f"seed {seed}: {sent}"[:4000])
            raise
    healthy = await asyncio.to_thread(answer_to, url, request("/health", method="GET"))
    assert healthy.status == 200
    return seen


async def test_whatever_is_sent_gets_an_answer_or_a_close(wired: Service) -> None:
    assert {100, 200, 400, 404, 405, 415, 431} & await check_many(wired.url, seed=1) >= {200, 400, 431}


@pytest.mark.nightly
@pytest.mark.timeout(NIGHTLY_SECONDS + 60)
async def test_much_that_is_sent_gets_an_answer_or_a_close(wired: Service) -> None:
    until, first = time.monotonic() + NIGHTLY_SECONDS, random.randrange(10**9)
    while time.monotonic() < until:
        await check_many(wired.url, seed=first)
        first += 1


@pytest.mark.parametrize("seconds", ["5e-324", "0.0001", "0", "-1", "nan", "1e309"])
def test_a_time_out_that_is_none_is_the_clients_mistake_however_slow_the_body(wired: Service, seconds: str) -> None:
    sent = request("/v1/embeddings", b'{"input":"x"}', f"X-Request-Timeout: {seconds}")
    for pieces in ((sent,), (sent[:-4], sent[-4:])):
        answer = answer_to(wired.url, *pieces)
        assert answer.status == 400
        assert "x-request-timeout" in answer.text.lower()
