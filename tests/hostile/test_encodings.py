"""Compressed bodies and other ways to write JSON: read within the limits, or refused with the header's name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import psutil
import pytest

from tests.conftest import serving
from tests.faults.service import Service
from tests.hostile.wire import answer_to, request

BODY = b'{"input":"x"}'
LONG = b'{"input":"' + b"some words of a text " * 3000 + b'"}'
JSON = {"content-type": "application/json"}


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


ENCODED = [
    ("gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("identity", bytes),
    ("", bytes),
]


@pytest.mark.parametrize(("coding", "encode"), ENCODED, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("body", [BODY, LONG], ids=["short", "long"])
async def test_encoded_bodies_are_read(
    client: httpx.AsyncClient, coding: str, encode: Callable[[bytes], bytes], body: bytes
) -> None:
    plain = await client.post("/v1/embeddings", content=body, headers=JSON)
    answer = await client.post("/v1/embeddings", content=encode(body), headers={**JSON, "content-encoding": coding})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == plain.json()["data"]


async def pieces_of(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("encode", [gzip.compress, zlib.compress, raw_deflate])
async def test_encoded_bodies_may_come_byte_by_byte(
    client: httpx.AsyncClient, encode: Callable[[bytes], bytes]
) -> None:
    coding = "gzip" if encode is gzip.compress else "deflate"
    headers = {**JSON, "content-encoding": coding}
    answer = await client.post("/v1/embeddings", content=pieces_of(encode(BODY), 1), headers=headers)
    assert answer.status_code == 200, answer.text


async def test_a_gzip_file_of_several_members_is_one_body(client: httpx.AsyncClient) -> None:
    body = gzip.compress(BODY[:6]) + gzip.compress(b"") + gzip.compress(BODY[6:])
    answer = await client.post("/v1/embeddings", content=body, headers={**JSON, "content-encoding": "gzip"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/api/embed", "/v2/rerank", "/jobs", "/v1/files"])
@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "aes128gcm"])
async def test_other_encodings_are_a_415_that_names_the_header(
    client: httpx.AsyncClient, path: str, coding: str
) -> None:
    answer = await client.post(path, content=BODY, headers={**JSON, "content-encoding": coding})
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.text
    assert answer.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("coding", "body", "reason"),
    [
        ("gzip", BODY, "not valid"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-1], "breaks off"),
        ("gzip", gzip.compress(BODY, mtime=0)[:12], "breaks off"),
        ("gzip", gzip.compress(BODY, mtime=0) + b"more", "not valid"),
        ("gzip", gzip.compress(BODY, mtime=0) + gzip.compress(b"", mtime=0) * 2000, "goes on"),
        ("deflate", zlib.compress(BODY)[:-1], "breaks off"),
        ("deflate", zlib.compress(BODY) + b"more", "goes on"),
        ("deflate", b"x", "breaks off"),
        ("deflate", b"\xff" * 100, "not valid"),
    ],
)
async def test_what_is_not_so_encoded_is_a_400(
    client: httpx.AsyncClient, coding: str, body: bytes, reason: str
) -> None:
    answer = await client.post("/v1/embeddings", content=body, headers={**JSON, "content-encoding": coding})
    assert answer.status_code == 400, answer.text
    assert reason in answer.text
    assert "Content-Encoding" in answer.text


async def test_the_limit_counts_what_a_body_is_decompressed_to() -> None:
    async with serving(max_body_bytes=20_000) as client:
        texts = b"".join(b'"%d",' % number for number in range(4000))
        body = b'{"inputs":[' + texts[:-1] + b"]}"
        assert len(gzip.compress(body)) < 20_000 < len(body)
        answer = await client.post("/embed", content=gzip.compress(body), headers={**JSON, "content-encoding": "gzip"})
        assert answer.status_code == 413
        assert "MAX_BODY_BYTES" in answer.text


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_bomb_takes_no_memory(wired: Service, times: int) -> None:
    process = psutil.Process(wired.pid)
    before = process.memory_info().rss
    bomb = gzip.compress(b"\0" * 200_000_000, 9)
    body = gzip.compress(bomb, 9) if times == 2 else bomb
    answer = answer_to(wired.url, request("/v1/embeddings", body, "Content-Encoding: gzip"))
    # One that is packed twice comes out as bytes that are no JSON.
    assert answer.status == {1: 413, 2: 400}[times]
    assert process.memory_info().rss - before < 30_000_000


async def test_a_small_body_may_not_grow_without_end(client: httpx.AsyncClient) -> None:
    body = gzip.compress(b'{"input":"' + b" " * 10_000_000 + b'"}', 9)
    answer = await client.post("/v1/embeddings", content=body, headers={**JSON, "content-encoding": "gzip"})
    assert answer.status_code == 413
    assert "Content-Encoding" in answer.text


@pytest.mark.parametrize(("path", "body"), [("/v1/embeddings", BODY), ("/embed", b'{"inputs":"x"}')])
async def test_a_byte_order_mark_says_nothing(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    answer = await client.post(path, content=b"\xef\xbb\xbf" + body, headers=JSON)
    assert answer.status_code == 200
    assert (await client.post("/jobs", content=b'\xef\xbb\xbf{"project":3}', headers=JSON)).status_code == 400


UNTYPED = ("application/x-www-form-urlencoded", "text/plain;charset=UTF-8", None)


@pytest.mark.parametrize("kind", UNTYPED)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/embed", b'{"model":"m","input":"x"}'),
        ("/api/embeddings", b'{"model":"m","prompt":"x"}'),
        ("/api/show", b'{"model":"all-MiniLM-L6-v2"}'),
        ("/embedding", b'{"content":"x"}'),
        ("/vectors", b'{"text":"x"}'),
    ],
)
async def test_dialects_that_ignore_the_type_of_a_body(
    client: httpx.AsyncClient, path: str, body: bytes, kind: str | None
) -> None:
    """`curl -d` without a header, as Ollama's documentation has it."""
    answer = await client.post(path, content=body, headers={} if kind is None else {"content-type": kind})
    assert answer.status_code == 200, answer.text
