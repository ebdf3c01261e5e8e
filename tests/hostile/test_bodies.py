"""JSON of any shape and size: counted before it is parsed, parsed in pieces, and answered with what is wrong."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.stalls import memory_taken
from vecmill.core.errors import BodyTooLarge, InvalidInput, MalformedBody, VecmillError
from vecmill.core.json_body import JsonLimits, parse

SIZE = 8_000_000
MOST_ERROR_BYTES = 4096
# Of the processor, not of the clock: other programs do not count. It takes a tenth of this.
MOST_SECONDS = 2.0


def filled(before: str, unit: str, after: str, between: str = ",") -> bytes:
    """A body of SIZE bytes."""
    unit_bytes = (unit + between).encode()
    return before.encode() + unit_bytes * (SIZE // len(unit_bytes)) + unit.encode() + after.encode()


TOO_MUCH = {
    "numbers": filled('{"input":"x","other":[', "1", "]}"),
    "lists": filled('{"input":"x","other":[', "[1]", "]}"),
    "empty lists": filled('{"input":"x","other":[', "[]", "]}"),
    "objects": filled('{"input":"x","other":[', '{"a":1}', "]}"),
    "texts": filled('{"input":"x","other":[', '"a"', "]}"),
    "one key": filled('{"input":"x","other":{', '"a":1', "}}"),
    "brackets": filled('{"input":"x","other":', "[", "", between=""),
    "many levels": filled('{"input":"x","other":[', '{"a":' * 300 + "1" + "}" * 300, "]}"),
}
TAKEN = {
    "one text": filled('{"input":"x","other":"', "a", '"}', between=""),
    "a wide character": filled('{"input":"x","other":"😀', "a", '"}', between=""),
    "escapes": filled('{"input":"x","other":"', r"\u0041", '"}', between=""),
    "pairs": filled('{"input":"x","other":"', r"\ud83d\ude00", '"}', between=""),
    "backslashes": filled('{"input":"x","other":"', "\\\\", '"}', between=""),
    "white space": filled('{"input":"x"', " ", "}", between=""),
    "structure within a text": filled('{"input":"x","other":"', '[{\\",:', '"}', between=""),
}
NOT_JSON = {
    "a NaN at the end": (filled('{"input":["', "a", '",NaN]}', between=""), "NaN"),
    "a long number": (filled('{"input":', "9", "}", between=""), "JSON"),
    "no UTF-8": (b'{"input":"' + b"a" * SIZE + b'\xff"}', "UTF-8"),
    "bytes within a character": (b'{"input":"' + b"\x80" * SIZE + b'"}', "UTF-8"),
    "half a pair": (
        filled('{"input":["x","', "a", '\\ud83d"]}', between=""),
        "`input[1]` has half of a surrogate pair",
    ),
    "half a pair as a key": (filled('{"input":"', "a", '","\\ud83d":1}', between=""), "surrogate pair"),
    "no end": (filled('{"input":"', "a", '"', between=""), "JSON"),
    "a second value": (filled('{"input":"', "a", '"}{}', between=""), "JSON"),
    "nothing between commas": (filled('{"input":["', "a", '",,1]}', between=""), "JSON"),
    "another bracket": (filled('{"input":["', "a", '"}', between=""), "JSON"),
}


async def sent(client: httpx.AsyncClient, body: bytes, path: str = "/v1/embeddings") -> httpx.Response:
    """The answer, for which neither long work nor much memory was needed."""
    with memory_taken() as memory:
        began = time.process_time()
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        taken = time.process_time() - began
    assert taken < MOST_SECONDS
    assert memory.highest < 8 * len(body) + 50_000_000
    assert answer.is_success or len(answer.content) <= MOST_ERROR_BYTES
    return answer


@pytest.mark.parametrize("shape", TOO_MUCH)
async def test_a_body_of_too_many_values_is_a_413_that_names_field_and_cure(
    client: httpx.AsyncClient, shape: str
) -> None:
    answer = await sent(client, TOO_MUCH[shape])
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["param"].partition(".")[0] == "other"
    assert f"`{error['param']}`" in error["message"]
    assert "split the request" in error["message"]


@pytest.mark.parametrize("shape", TAKEN)
async def test_a_large_body_of_few_values_is_answered(client: httpx.AsyncClient, shape: str) -> None:
    assert (await sent(client, TAKEN[shape])).status_code == 200


@pytest.mark.parametrize("shape", NOT_JSON)
async def test_what_is_wrong_with_a_large_body_is_named(client: httpx.AsyncClient, shape: str) -> None:
    body, named = NOT_JSON[shape]
    answer = await sent(client, body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_large_requests_that_clients_send_are_read() -> None:
    texts = {"input": [f"{number} " + "def add(a, b): return {a: [b, '\"\\\\']}\n" * 180 for number in range(2048)]}
    ids = {"input": [list(range(1000, 1600)) for _ in range(2048)]}
    objects = {"documents": [{"text": "a", **{f"key {key}": key for key in range(20)}} for _ in range(2048)]}
    for request in (texts, ids, objects):
        assert parse(orjson.dumps(request)) == request


def test_more_inputs_may_be_allowed() -> None:
    body = orjson.dumps({"documents": [{"text": "a", "title": "b"}] * 100_000})
    with pytest.raises(BodyTooLarge, match="`documents`"):
        parse(body)
    assert len(parse(body, JsonLimits.for_inputs(100_000))["documents"]) == 100_000


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"a":{"b":[1,{"c":"\\ud800"}]}}', "a.b[1].c"),
        (b'{"a":[[1,2],[3],["\\ud800x"]]}', "a[2][0]"),
        (b'{"' + b"k" * 5000 + b'":"\\ud800"}', "k" * 60),
        (b'{"a":1,"\\ud800":2}', None),
        (b'["\\udc00"]', "[0]"),
    ],
)
def test_the_place_of_half_a_pair_is_named(body: bytes, named: str | None) -> None:
    for piece in (10, 1_048_576):
        with pytest.raises(InvalidInput) as raised:
            parse(body, piece=piece)
        assert raised.value.param == named


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_told_apart(number: str) -> None:
    with pytest.raises(MalformedBody, match="NaN and Infinity are not JSON"):
        parse(f'{{"a": {number}}}'.encode())


texts = st.text(st.sampled_from('a"\\\né漢😀[]{},: u0'), max_size=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)


def parsed(body: bytes, piece: int) -> Any:
    """The value, or why there is none."""
    try:
        return parse(body, piece=piece)
    except VecmillError as error:
        return type(error)


def oracle(body: bytes) -> Any:
    """What orjson says of the whole."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


@settings(max_examples=150, deadline=None)
@given(value=values, ascii_only=st.booleans(), indent=st.sampled_from([None, 1, 12]), piece=st.integers(14, 80))
def test_pieces_make_up_the_whole(value: object, ascii_only: bool, indent: int | None, piece: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).replace("[]", "[" + " " * piece + "]")
    assert parse(text.encode(), piece=piece) == orjson.loads(text.encode())


@settings(max_examples=250, deadline=None)
@given(value=values, data=st.data(), piece=st.integers(14, 80))
def test_what_is_no_json_as_a_whole_is_none_in_pieces(value: object, data: st.DataObject, piece: int) -> None:
    body = bytearray(json.dumps(value, ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from([b"", *map(bytes, spelled())]))
    whole, pieces = oracle(bytes(body)), parsed(bytes(body), piece)
    if whole is None:
        assert pieces in (None, MalformedBody, InvalidInput)
        assert pieces is None or bytes(body).strip() != b"null"
    else:
        assert pieces == whole or (isinstance(whole, float) and math.isnan(whole))


def spelled() -> Iterator[list[int]]:
    """What JSON is made of, byte by byte, and a byte that is no UTF-8."""
    yield from ([byte] for byte in b'[]{},:"\\ u1' + b"\xff")


async def test_a_line_of_too_many_values_fails_alone_in_the_validation(client: httpx.AsyncClient) -> None:
    line = b'{"custom_id":"%d","method":"POST","url":"/v1/embeddings","body":{"input":%b}}'
    lines = [line % (1, b'"fine"'), line % (2, b"[" + b"[]," * 200_000 + b"[]]")]
    form = {"files": {"file": ("input.jsonl", b"\n".join(lines))}, "data": {"purpose": "batch"}}
    file_id = (await client.post("/v1/files", **form)).json()["id"]  # type: ignore[arg-type]
    batch_fields = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch = (await client.post("/v1/batches", json=batch_fields)).json()
    while batch["status"] not in ("failed", "completed"):
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["status"] == "failed"
    [error] = batch["errors"]["data"]
    assert (error["line"], error["code"], error["param"]) == (2, "line_too_long", "body.input")
    assert "split the request" in error["message"]
