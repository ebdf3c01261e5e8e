"""Vectors in every format that a client can ask for, whole and streamed, equal the floats."""

from __future__ import annotations

import asyncio
import base64
import gzip
import importlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard
from isal import isal_zlib
from numpy.typing import NDArray

from tests.servers import RunningServer
from vecmill.http import compression
from vecmill.http.encoding import STREAM_FROM_BYTES

TEXTS = ["def add(a, b): return a + b", "Berlin has 3.5 million inhabitants.", "", "naïve café"]
MANY = [f"text number {index}" for index in range(400)]  # 400 x 384 floats: streamed, as base64 not


async def floats(client: httpx.AsyncClient, texts: list[str] = TEXTS) -> NDArray[np.float32]:
    answer = await client.post("/embed", json={"inputs": texts})
    return np.array(answer.json(), np.float32)


async def openai(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post("/v1/embeddings", json={"input": TEXTS, **fields})
    assert answer.status_code == 200, answer.text
    return [entry["embedding"] for entry in answer.json()["data"]]


async def test_base64_where_it_is_asked_for_and_only_there(client: httpx.AsyncClient) -> None:
    wanted = await floats(client)
    base64_words: list[dict[str, Any]] = [{"encoding_format": "base64"}, {"embedding_type": "base64"}]
    for fields in base64_words:
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in await openai(client, **fields)]
        np.testing.assert_array_equal(np.stack(rows), wanted)
    for fields in ({}, {"encoding_format": "float"}, {"encoding_format": None}, {"embedding_type": ["float"]}):
        np.testing.assert_array_equal(np.array(await openai(client, **fields), np.float32), wanted)


async def test_one_bit_is_the_sign(client: httpx.AsyncClient) -> None:
    signs = np.packbits(await floats(client) > 0, axis=1)
    for fields in ({"embedding_type": "ubinary"}, {"output_dtype": "ubinary"}):
        np.testing.assert_array_equal(await openai(client, **fields), signs)
    for fields in ({"embedding_type": "binary"}, {"output_dtype": "binary"}):
        np.testing.assert_array_equal(np.array(await openai(client, **fields)) + 128, signs)
    packed = await openai(client, output_dtype="ubinary", encoding_format="base64")  # Voyage
    np.testing.assert_array_equal([np.frombuffer(base64.b64decode(row), np.uint8) for row in packed], signs)


async def test_eight_bits_keep_the_direction_and_one_scale(client: httpx.AsyncClient) -> None:
    wanted = await floats(client)
    scale = 127 * np.sqrt(wanted.shape[1]) / 8
    int8 = np.array(await openai(client, output_dtype="int8"))
    np.testing.assert_array_equal(int8, np.clip(np.rint(wanted * scale), -127, 127))
    np.testing.assert_array_equal(np.array(await openai(client, output_dtype="uint8")), int8 + 128)
    cosines = (int8 * wanted).sum(axis=1) / np.linalg.norm(int8, axis=1)
    assert cosines.min() > 0.9995
    alone = await client.post("/v1/embeddings", json={"input": TEXTS[1], "output_dtype": "int8"})
    assert np.abs(np.array(alone.json()["data"][0]["embedding"]) - int8[1]).max() <= 1  # whatever else is asked with it


async def test_several_types_at_once(client: httpx.AsyncClient) -> None:
    types = ["ubinary", "float", "int8", "base64", "uint8", "binary", "float"]
    answer = await client.post("/v2/embed", json={"texts": TEXTS, "embedding_types": types})
    body = answer.json()
    wanted = await floats(client)
    assert set(body["embeddings"]) == set(types)
    np.testing.assert_array_equal(np.array(body["embeddings"]["float"], np.float32), wanted)
    np.testing.assert_array_equal(body["embeddings"]["ubinary"], np.packbits(wanted > 0, axis=1))
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in body["embeddings"]["base64"]]
    np.testing.assert_array_equal(decoded, wanted)
    assert body["texts"] == TEXTS
    assert body["meta"]["billed_units"]["input_tokens"] > 10


async def test_a_large_answer_is_streamed_and_the_same(client: httpx.AsyncClient) -> None:
    whole = await client.post("/v1/embeddings", json={"input": MANY, "encoding_format": "base64"})
    streamed = await client.post("/v1/embeddings", json={"input": MANY}, headers={"accept-encoding": "identity"})
    assert "content-length" in whole.headers
    assert "content-length" not in streamed.headers
    assert len(streamed.content) > STREAM_FROM_BYTES
    decoded = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in whole.json()["data"]]
    entries = streamed.json()["data"]
    np.testing.assert_array_equal(np.array([entry["embedding"] for entry in entries], np.float32), decoded)
    assert [entry["index"] for entry in entries] == list(range(len(MANY)))
    assert streamed.json()["usage"] == whole.json()["usage"]


DECODED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "zstd": lambda raw: zstandard.ZstdDecompressor().decompressobj().decompress(raw),
    "": bytes,
}


# What the header asks for is found out before it is known how the answer is sent: streamed are one of each coding.
@pytest.mark.parametrize(
    ("accepted", "coding", "texts"),
    [
        ("gzip", "gzip", TEXTS),
        ("gzip, deflate, br, zstd", "zstd", TEXTS),
        ("zstd;q=0.5, gzip;q=0.8", "gzip", TEXTS),
        ("zstd;q=0, *", "gzip", TEXTS),
        ("gzip;q=0", "", TEXTS),
        ("br, identity", "", TEXTS),
        ("identity, gzip", "gzip", TEXTS),
        ("identity, gzip;q=0.5, zstd;q=0.1", "", TEXTS),
        ("identity;q=0.5, gzip;q=0.8, zstd;q=0.1", "gzip", TEXTS),
        ("ZSTD;q=nonsense", "zstd", TEXTS),
        ("zstd" + 20_000 * ",", "zstd", TEXTS),
        (20_000 * "," + "zstd", "", TEXTS),
        ("", "", TEXTS),
        pytest.param("gzip", "gzip", MANY, id="streamed-gzip"),
        pytest.param("gzip, deflate, br, zstd", "zstd", MANY, id="streamed-zstd"),
        pytest.param("br, identity", "", MANY, id="streamed"),
    ],
)
async def test_an_answer_is_compressed_as_the_client_likes_it_best(
    client: httpx.AsyncClient, accepted: str, coding: str, texts: list[str]
) -> None:
    plain = await client.post("/embed", json={"inputs": texts}, headers={"accept-encoding": "identity"})
    async with client.stream("POST", "/embed", json={"inputs": texts}, headers={"accept-encoding": accepted}) as answer:
        assert answer.headers.get("content-encoding", "") == coding
        assert (answer.headers.get("vary") == "Accept-Encoding") is bool(coding)
        raw = b"".join([chunk async for chunk in answer.aiter_raw()])
    assert DECODED[coding](raw) == plain.content


async def test_a_list_may_come_in_several_headers(client: httpx.AsyncClient) -> None:
    """Also where only gzip is made, of what is fetched."""
    for lines, coding, fetched in (
        (("gzip;q=0.5", "identity"), "", ""),
        (("*", "gzip;q=0"), "", ""),
        (("gzip;q=0.1", "zstd"), "zstd", "gzip"),
    ):
        headers = [("accept-encoding", line) for line in lines]
        answers = (
            await client.post("/embed", json={"inputs": TEXTS}, headers=headers),
            await client.post("/v1/rerank", json={"query": "q", "documents": MANY}, headers=headers),
            await client.get("/metrics", headers=headers),
        )
        codings = [answer.headers.get("content-encoding", "") for answer in answers]
        assert codings == [coding, coding, fetched]


async def test_scores_are_compressed_too(client: httpx.AsyncClient) -> None:
    body = {"query": "q", "documents": MANY}
    answers = [await client.post("/v1/rerank", json=body, headers={"accept-encoding": way}) for way in DECODED]
    assert [answer.headers.get("content-encoding", "") for answer in answers] == list(DECODED)
    assert len({str(answer.json()["results"]) for answer in answers}) == 1


def test_gzip_is_zlibs_where_isa_l_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    try:
        importlib.reload(compression)
        assert compression.gzip_maker is zlib
        assert gzip.decompress(compression.Coding.GZIP.compress(b"abc" * 1000)) == b"abc" * 1000
        compressor = compression.Coding.GZIP.compressor()
        assert gzip.decompress(compressor.compress(b"abc" * 1000) + compressor.flush()) == b"abc" * 1000
    finally:
        monkeypatch.undo()
        importlib.reload(compression)
    assert compression.gzip_maker is isal_zlib


ROUTES: dict[str, dict[str, Any]] = {
    "/embed": {"inputs": TEXTS},
    "/v1/embeddings": {"input": TEXTS},
    "/api/embed": {"model": "all-MiniLM-L6-v2", "input": TEXTS},
    "/v2/embed": {"texts": TEXTS, "input_type": "search_document", "embedding_types": ["float"]},
}


@pytest.mark.parametrize("path", ROUTES)
async def test_raw_rows_where_the_client_accepts_bytes(client: httpx.AsyncClient, path: str) -> None:
    wanted = await floats(client)
    for accept, dtype in (
        ("application/octet-stream", "<f4"),
        ("application/octet-stream; dtype=float32, */*;q=0.1", "<f4"),
        ("application/json;q=0.5, Application/Octet-Stream;dtype=float16", "<f2"),
        ("application/octet-stream ; dtype = float16", "<f2"),
        ("*/*, application/octet-stream", "<f4"),
        ("application/*;q=0.5, application/octet-stream;q=0.5", "<f4"),
        ("*/*, application/json;q=0.1, application/octet-stream;q=0.2", "<f4"),
        ("application/octet-stream" + 20_000 * ",", "<f4"),
    ):
        answer = await client.post(path, json=ROUTES[path], headers={"accept": accept})
        assert (answer.status_code, answer.headers["x-embedding-shape"]) == (200, "4,384"), answer.text
        name = {"<f4": "float32", "<f2": "float16"}[dtype]
        assert answer.headers["content-type"] == f"application/octet-stream; dtype={name}"
        assert int(answer.headers["x-compute-tokens"]) > 0
        rows = np.frombuffer(answer.content, dtype).reshape(4, 384)
        np.testing.assert_array_equal(rows, wanted.astype(dtype))
    for accept in (
        "application/json, application/octet-stream",
        "*/*",
        "application/octet-stream;q=0",
        "text/html",
        "application/octet-stream;q=0.1, */*",
        "application/octet-stream;q=0.5, application/*;q=0.9, */*;q=0.1",
    ):
        answer = await client.post(path, json=ROUTES[path], headers={"accept": accept})
        assert answer.headers["content-type"] == "application/json"
    several = [("accept", "text/plain"), ("accept", "application/octet-stream")]
    answer = await client.post(path, json=ROUTES[path], headers=several)
    assert answer.headers["content-type"] == "application/octet-stream; dtype=float32"


@pytest.mark.parametrize("path", ROUTES)
async def test_bytes_that_cannot_be_had_are_a_400_that_says_so(client: httpx.AsyncClient, path: str) -> None:
    bad = {"accept": "application/octet-stream; dtype=float8"}
    answer = await client.post(path, json=ROUTES[path], headers=bad)
    assert answer.status_code in (400, 422)
    assert "dtype=float8 is not served: float32 or float16" in answer.text
    fields: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"output_dtype": "int8"},
        "/v2/embed": {"embedding_types": ["float", "int8"]},
    }
    if path in fields:
        body = ROUTES[path] | fields[path]
        answer = await client.post(path, json=body, headers={"accept": "application/octet-stream"})
        assert answer.status_code == 400
        assert "gives floats" in answer.text


async def test_several_types_are_streamed_in_their_order(client: httpx.AsyncClient) -> None:
    body = {"texts": MANY, "embedding_types": ["int8", "float"]}
    embeddings = (await client.post("/v2/embed", json=body)).json()["embeddings"]
    wanted = await floats(client, MANY)
    np.testing.assert_array_equal(np.array(embeddings["float"], np.float32), wanted)
    assert np.abs(np.array(embeddings["int8"]) - wanted * 127 * np.sqrt(384) / 8).max() <= 0.5


async def test_a_client_that_leaves_in_the_middle_of_its_answer_disturbs_nobody(server: RunningServer) -> None:
    body = {"input": MANY * 3, "user": "x"}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for _ in range(3):
            async with client.stream("POST", "/v1/embeddings", json=body) as answer:
                assert answer.status_code == 200
                await anext(answer.aiter_raw())
        answers = await asyncio.gather(*(client.post("/embed", json={"inputs": "x"}) for _ in range(8)))
        assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize("fields", [{"embedding_type": ["float", "int8"]}, {"output_dtype": "int4"}])
async def test_a_format_that_is_none_is_named(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await client.post("/v1/embeddings", json={"input": "x", **fields})
    assert answer.status_code == 400
    assert next(iter(fields)) in answer.json()["error"]["param"]
