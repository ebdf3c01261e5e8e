"""Whatever a client sends, it gets its dialect's own 4xx that names the field, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api_document import DOCUMENT
from tests.conftest import serving


def openai_error(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


BAD_EMBEDDINGS: list[tuple[bytes | object, int, str]] = [
    (b"{", 400, "JSON"),
    (b"", 400, "JSON object"),
    (b"[1, 2]", 400, "JSON object"),
    (b"\xff\xfe", 400, "JSON"),
    (b'{"input": NaN}', 400, "NaN"),
    (b'{"input": ["fine", "half \\ud83d of one"]}', 400, "input[1]"),
    (b"[" * 5000, 400, "JSON"),
    ({}, 400, "input"),
    ({"input": None}, 400, "input"),
    ({"input": 7}, 400, "input"),
    ({"input": {"text": "x"}}, 400, "input"),
    ({"input": []}, 400, "empty"),
    ({"input": [[]]}, 400, "input[0]"),
    ({"input": ["a", 3]}, 400, "entry 1"),
    ({"input": [1, "a"]}, 400, "entry 1"),
    ({"input": [1, True]}, 400, "entry 1"),
    ({"input": [1.5]}, 400, "entry 0"),
    ({"input": [[1], ["a"]]}, 400, "entry 1"),
    ({"input": [200_000, 7]}, 400, "check_embedding_ctx_length=False"),
    ({"input": [[15339], [-1]]}, 400, "input[1]"),
    ({"input": [2**40]}, 400, "input"),
    ({"input": "x", "dimensions": -1}, 400, "dimensions"),
    ({"input": [{"image": "https://example.org/x.png"}]}, 400, "not served here"),
    ({"input": "x", "late_chunking": True}, 400, "late_chunking"),
    ({"input": "x", "embed_dtype": "float16"}, 400, "embed_dtype"),
    ({"input": "x", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ({"input": "x", "truncate_prompt_tokens": 2}, 400, "special tokens"),
    ({"input": "x", "truncation_side": "middle"}, 400, "truncation_side"),
    ({"input": "x", "dimensions": 385}, 400, "384"),
    ({"input": "x", "dimensions": "many"}, 400, "dimensions"),
    ({"input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
    ({"input": "x", "model": 3}, 400, "model"),
    ({"input": ["x"] * 2049}, 400, "MAX_CLIENT_BATCH_SIZE"),
]


@pytest.mark.parametrize(("body", "status", "named"), BAD_EMBEDDINGS)
async def test_openai_embeddings(client: httpx.AsyncClient, body: object, status: int, named: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = openai_error(answer)
    assert named in f"{error['message']} {error['param']}"
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "kind", "named"),
    [
        (b"{", 400, "Validation", "JSON"),
        ({"inputs": []}, 400, "Empty", "inputs"),
        ({"inputs": 7}, 422, "Validation", "inputs"),
        ({"inputs": [101, -5]}, 422, "Validation", "inputs[0]"),
        ({"inputs": "x", "dimensions": 999}, 422, "Validation", "dimensions"),
        ({"inputs": "x", "prompt_name": "nope"}, 422, "Validation", "prompt_name"),
        ({"inputs": "x", "is_query": "perhaps"}, 422, "Validation", "is_query"),
        ({"inputs": ["x"] * 2049}, 422, "Validation", "MAX_CLIENT_BATCH_SIZE"),
    ],
)
async def test_embed(client: httpx.AsyncClient, body: object, status: int, kind: str, named: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post("/embed", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert named in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": 1}, "documents"),
        ({"query": "q", "documents": [{"image": "x"}]}, "not served here"),
        ({"query": "q", "documents": [{"title": "t"}], "rank_fields": ["body"]}, "rank_fields"),
        ({"query": "q", "documents": ["a", 3]}, "entry 1"),
        ({"query": "q", "documents": [{"title": "no text"}]}, "documents[0]"),
        ({"query": ["q"], "documents": ["a"]}, "query"),
        ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "q", "documents": ["a"] * 2049}, "MAX_CLIENT_BATCH_SIZE"),
    ],
)
async def test_rerank(client: httpx.AsyncClient, body: object, named: str) -> None:
    answer = await client.post("/v1/rerank", json=body)
    assert answer.status_code == 400
    assert named in openai_error(answer)["message"]
    assert answer.json()["message"] == answer.json()["detail"] == answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "named"),
    [
        ("POST", "/jobs", {"project": "p"}, 400, "total_chunks"),
        ("POST", "/jobs", {"project": "p", "total_chunks": -1}, 400, "total_chunks"),
        ("POST", "/jobs", {"project": 3, "total_chunks": 1}, 400, "project"),
        ("GET", "/jobs/nope", None, 404, "nope"),
        ("POST", "/jobs/nope/progress", {"current": 1}, 404, "nope"),
        ("POST", "/jobs/nope/complete", None, 404, "nope"),
        ("DELETE", "/jobs/nope", None, 404, "nope"),
        ("POST", "/progress", {"current": -1, "total": 2}, 400, "current"),
        ("PUT", "/jobs", None, 405, "GET"),
        ("GET", "/nowhere", None, 404, "/docs"),
    ],
)
async def test_jobs(client: httpx.AsyncClient, method: str, path: str, body: object, status: int, named: str) -> None:
    answer = await client.request(method, path, json=body)
    assert answer.status_code == status
    assert named in answer.json()["detail"]


async def test_wrong_method_and_wrong_path_keep_the_dialects_shape(client: httpx.AsyncClient) -> None:
    wrong_method = await client.get("/v1/embeddings")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert "POST" in openai_error(wrong_method)["message"]
    assert (await client.get("/embed")).json()["error_type"] == "Validation"
    assert (await client.post("/v1/nothing", json={})).status_code == 404


async def test_json_is_taken_without_a_content_type(client: httpx.AsyncClient) -> None:
    """Weaviate sends none."""
    answer = await client.post("/vectors", content=b'{"text": "x"}')
    assert answer.status_code == 200
    assert "content-type" not in answer.request.headers


async def test_a_form_is_refused_with_the_cure(client: httpx.AsyncClient) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}  # curl's, where no header is given
    answer = await client.post("/v1/embeddings", content=b'{"input": "x"}', headers=form)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in openai_error(answer)["message"]


async def test_an_error_repeats_no_text(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/embeddings", json={"input": ["my secret text", 3]})
    assert "secret" not in answer.text


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", "\ufffe", "😀" * 2000, " " * 100_000, "x" * 100_000, "\u202e"])
async def test_strange_text_is_embedded(client: httpx.AsyncClient, text: str) -> None:
    for path, key in (("/v1/embeddings", "input"), ("/embed", "inputs")):
        assert (await client.post(path, json={key: text})).status_code == 200


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 40_000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


BODIES = {
    f"{path} {name}": (path, example["value"], sorted(DOCUMENT["components"]["schemas"][name]["properties"]))
    for path, methods in DOCUMENT["paths"].items()
    if "post" in methods and "{" not in path
    for content in methods["post"].get("requestBody", {}).get("content", {}).values()
    for name, example in content.get("examples", {}).items()
}


@pytest.mark.parametrize("name", BODIES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_no_json_whatever_in_any_field_gives_a_500(
    client: httpx.AsyncClient, name: str, data: st.DataObject
) -> None:
    path, example, fields = BODIES[name]
    field, value = data.draw(st.sampled_from(fields)), data.draw(json_values)
    answer = await client.post(path, json={**example, field: value})
    assert 200 <= answer.status_code < 500, (field, value, answer.text)
    assert answer.json() is not None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted({path for path, _, _ in BODIES.values()})), value=json_values)
async def test_no_body_whatever_gives_a_500(client: httpx.AsyncClient, path: str, value: object) -> None:
    assert (await client.post(path, json=value)).status_code < 500


@pytest.fixture(scope="module")
async def strict() -> AsyncIterator[httpx.AsyncClient]:
    """Truncation off, strict names, small limits."""
    async with serving(
        auto_truncate=False, strict_model=True, max_body_bytes=20_000, max_client_batch_size=4
    ) as client:
        yield client


async def test_too_long_without_truncation_is_a_400_in_openais_words(strict: httpx.AsyncClient) -> None:
    answer = await strict.post("/v1/embeddings", json={"input": ["ok", "word " * 300]})
    assert answer.status_code == 400
    assert openai_error(answer)["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in openai_error(answer)["message"]
    assert openai_error(answer)["param"] == "input[1]"
    assert (await strict.post("/embed", json={"inputs": "word " * 300, "truncate": True})).status_code == 200


async def test_unknown_models_are_404_where_names_are_strict(strict: httpx.AsyncClient) -> None:
    answer = await strict.post("/v1/embeddings", json={"input": "x", "model": "text-embedding-3-small"})
    assert answer.status_code == 404
    assert openai_error(answer)["code"] == "model_not_found"
    assert "all-MiniLM-L6-v2" in openai_error(answer)["message"]
    own = {"input": "x", "model": "sentence-transformers/all-MiniLM-L6-v2"}
    assert (await strict.post("/v1/embeddings", json=own)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/rerank", "/jobs"])
async def test_a_body_over_the_limit_is_a_413(strict: httpx.AsyncClient, path: str) -> None:
    declared = await strict.post(path, json={"input": "x" * 20_001})
    assert declared.status_code == 413
    assert "MAX_BODY_BYTES" in declared.text

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    undeclared = await strict.post(path, content=chunks(), headers={"content-type": "application/json"})
    assert undeclared.status_code == 413
    assert (await strict.post("/embed", json={"inputs": "still here"})).status_code == 200
