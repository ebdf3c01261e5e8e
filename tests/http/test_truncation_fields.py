"""Every way to say what is cut gives the vector of the text cut by hand, and what cannot be done is refused."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from tests.conftest import serving
from vecmill.core.types import Side, Truncation
from vecmill.http.dialects.bodies import TruncationFields

# Each word is one token.
TEXT = "one two three four five six seven"
START, END = "one two three", "five six seven"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LONG = " ".join(WORDS[index % 10] for index in range(1003))
ROOM = 254  # MiniLM's 256 without its two special tokens

CUTS: list[tuple[dict[str, Any], str]] = [
    ({"truncate_prompt_tokens": 5}, START),
    ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, START),
    ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, END),
    ({"truncate_prompt_tokens": 5, "truncation_side": "LEFT"}, END),
    ({"truncate_prompt_tokens": 5, "truncation_direction": "Left"}, END),
    ({"truncate_prompt_tokens": 5, "truncation_direction": "Right"}, START),
    ({"truncate_prompt_tokens": 5, "truncate": "START"}, END),
    ({"truncate_prompt_tokens": 5, "truncate": "end"}, START),
    ({"truncate_prompt_tokens": 5, "truncate": True, "truncation_side": "left"}, END),
    ({"truncate_prompt_tokens": 5, "truncation": True, "truncation_side": "left"}, END),
    ({"truncate_prompt_tokens": 9, "truncate": False}, TEXT),
    ({"truncate_prompt_tokens": 9, "truncate": "NONE"}, TEXT),
    ({"truncate_prompt_tokens": 1000}, TEXT),
    ({"truncate_prompt_tokens": -1}, TEXT),
    ({"truncate_prompt_tokens": None, "truncate": None, "truncation_side": None}, TEXT),
]


def body_of(path: str, text: str, fields: dict[str, Any]) -> dict[str, Any]:
    names = {"/v1/embeddings": "input", "/embed": "inputs", "/v2/embed": "texts", "/vectors": "texts"}
    return {names[path]: [text], **fields}


def vector_of(path: str, answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if path == "/v1/embeddings":
        return np.array(body["data"][0]["embedding"])
    if path == "/v2/embed":
        return np.array(body["embeddings"]["float"][0])
    return np.array(body["vectors"][0] if path == "/vectors" else body[0])


async def plain(client: httpx.AsyncClient, text: str) -> Any:
    return vector_of("/embed", await client.post("/embed", json={"inputs": text}))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/v2/embed", "/vectors"])
@pytest.mark.parametrize(("fields", "kept"), CUTS)
async def test_the_requests_limit(client: httpx.AsyncClient, path: str, fields: dict[str, Any], kept: str) -> None:
    answer = await client.post(path, json=body_of(path, TEXT, fields))
    np.testing.assert_allclose(vector_of(path, answer), await plain(client, kept), atol=1e-6)
    assert answer.headers.get("X-Truncated-Inputs") == (None if kept == TEXT else "0")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/v2/embed", "/vectors"])
@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({}, Side.RIGHT),
        ({"truncate": True}, Side.RIGHT),
        ({"truncate": "START"}, Side.LEFT),
        ({"truncation_side": "left"}, Side.LEFT),
        ({"truncation_direction": "Left"}, Side.LEFT),
        ({"truncate_prompt_tokens": -1, "truncation_side": "left"}, Side.LEFT),
        ({"truncate_prompt_tokens": 100_000, "truncation_side": "left"}, Side.LEFT),
    ],
)
async def test_the_models_limit(client: httpx.AsyncClient, path: str, fields: dict[str, Any], side: Side) -> None:
    answer = await client.post(path, json=body_of(path, LONG, fields))
    words = LONG.split()
    kept = " ".join(words[:ROOM] if side is Side.RIGHT else words[-ROOM:])
    np.testing.assert_allclose(vector_of(path, answer), await plain(client, kept), atol=1e-6)
    assert answer.headers["X-Truncated-Inputs"] == "0"


async def test_coheres_limit(client: httpx.AsyncClient) -> None:
    async def cut(**fields: object) -> Any:
        return vector_of("/v2/embed", await client.post("/v2/embed", json={"texts": [TEXT], **fields}))

    np.testing.assert_allclose(await cut(max_tokens=5), await plain(client, START), atol=1e-6)
    np.testing.assert_allclose(await cut(max_tokens=5, truncate="END"), await plain(client, START), atol=1e-6)
    np.testing.assert_allclose(await cut(max_tokens=5, truncate="START"), await plain(client, END), atol=1e-6)
    np.testing.assert_allclose(await cut(max_tokens=9, truncate="NONE"), await plain(client, TEXT), atol=1e-6)
    np.testing.assert_allclose(await cut(max_tokens=0), await plain(client, TEXT), atol=1e-6)


@pytest.mark.parametrize("refusing", [{"truncate": False}, {"truncate": "NONE"}, {"truncate": "none"}])
async def test_what_must_not_be_cut_is_refused(client: httpx.AsyncClient, refusing: dict[str, Any]) -> None:
    for text, fields in ((TEXT, {"truncate_prompt_tokens": 5}), (LONG, {}), (LONG, {"truncate_prompt_tokens": -1})):
        answer = await client.post("/v1/embeddings", json={"input": ["one", text], **fields, **refusing})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "input[1]")
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length" in error["message"]
    answer = await client.post("/v2/embed", json={"texts": [TEXT], "max_tokens": 5, **refusing})
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["message"]


async def test_voyages_word_refuses(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/embeddings", json={"input": LONG, "truncation": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_limit_of_the_request_counts_where_the_server_cuts_nothing() -> None:
    async with serving(auto_truncate=False) as client:
        answer = await client.post("/v1/embeddings", json={"input": TEXT, "truncate_prompt_tokens": 5})
        np.testing.assert_allclose(vector_of("/v1/embeddings", answer), await plain(client, START), atol=1e-6)
        answer = await client.post("/v1/embeddings", json={"input": LONG})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


TOO_SMALL: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": 1, "truncation_side": "left"}, "at least 3"),
    ("/v1/embeddings", {"input": [[101, 2028, 102]], "truncate_prompt_tokens": 1}, "at least 3"),
    ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": 4, "instruction": "find this: "}, "the prompt's 3"),
    ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": "many"}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": TEXT, "truncate": "MIDDLE"}, "NONE, START or END"),
    ("/v1/embeddings", {"input": TEXT, "truncate": 1}, "NONE, START or END"),
    ("/v1/embeddings", {"input": TEXT, "truncation_side": "middle"}, "truncation_side"),
    ("/v1/embeddings", {"input": TEXT, "truncation_direction": 3}, "truncation_direction"),
    ("/v2/embed", {"texts": [TEXT], "max_tokens": 2}, "`max_tokens`"),
    ("/v2/embed", {"texts": [TEXT], "max_tokens": -5}, "max_tokens"),
    ("/v1/rerank", {"query": "one", "documents": ["two"], "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
    ("/v1/rerank", {"query": "one", "documents": ["two"], "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
    ("/score", {"text_1": "one", "text_2": "two", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("path", "body", "named"), TOO_SMALL)
async def test_limits_that_make_no_sense_are_a_400(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], named: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["message"]


async def test_in_teis_dialect_they_have_its_shape(client: httpx.AsyncClient) -> None:
    answer = await client.post("/embed", json={"inputs": TEXT, "truncate_prompt_tokens": 2})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "Validation")
    answer = await client.post("/embed", json={"inputs": LONG, "truncate": False})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "Validation")


LEFT, RIGHT = Side.LEFT, Side.RIGHT


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Truncation()),
        ({"truncate": True}, Truncation(True)),
        ({"truncate": "true"}, Truncation(True)),
        ({"truncate": "False"}, Truncation(False)),
        ({"truncate": "START"}, Truncation(True, LEFT)),
        ({"truncate": "None"}, Truncation(False)),
        ({"truncate": "START", "truncation_side": "left", "truncation": True}, Truncation(True, LEFT)),
        ({"truncation": False, "truncate_prompt_tokens": 7}, Truncation(False, max_tokens=7)),
        ({"truncate_prompt_tokens": 7}, Truncation(True, max_tokens=7)),
        ({"truncate_prompt_tokens": -1}, Truncation(True)),
        ({"truncation_side": "left", "truncation_direction": "Left"}, Truncation(None, LEFT)),
        ({"truncation_direction": "LEFT"}, Truncation(None, LEFT)),
    ],
)
def test_what_fields_mean_together(fields: dict[str, Any], expected: Truncation) -> None:
    assert TruncationFields(**fields).asked_truncation() == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Truncation(False, None, 9)),
        ({"truncate": "START"}, Truncation(True, LEFT, 9)),
        ({"truncate_prompt_tokens": -1}, Truncation(True, None, 9)),
        ({"truncate_prompt_tokens": 9}, Truncation(True, None, 9)),
    ],
)
def test_a_dialects_own_defaults(fields: dict[str, Any], expected: Truncation) -> None:
    assert TruncationFields(**fields).asked_truncation(default=False, max_tokens=9) == expected


@pytest.mark.parametrize("fields", [{"truncate": 0}, {"truncate": "yes"}, {"truncate": []}, {"truncation_side": True}])
def test_other_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TruncationFields(**fields)
