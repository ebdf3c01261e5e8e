"""A field that is misspelt, or another server's word, is answered with a hint; what clients add of their own is not."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.conftest import serving
from vecmill.http.dialects.registry import RERANK
from vecmill.http.hints import LONGEST_NAME, MOST_HINTS

HINT = "x-vecmill-hint"
QUERY = {"query": "q", "documents": ["a", "b"]}


def meant(response: httpx.Response) -> dict[str, str]:
    """From each name that is not read to the one that is."""
    return dict(re.findall(r"`([^`]+)` is not read here: (?:did you mean )?`([^`]+)`", response.headers[HINT]))


@pytest.mark.parametrize(
    ("path", "body", "name", "known"),
    [
        ("/v1/embeddings", {"input": "x", "dimension": 12}, "dimension", "dimensions"),
        ("/v1/embeddings", {"input": "x", "truncat": True}, "truncat", "truncate"),
        ("/v1/embeddings", {"input": "x", "inputType": "query"}, "inputType", "input_type"),
        ("/v1/embeddings", {"input": "x", "encodingFormat": "base64"}, "encodingFormat", "encoding_format"),
        ("/v1/embeddings", {"input": "x", "modle": "m"}, "modle", "model"),
        ("/v1/embeddings", {"input": "x", "Prompt-Name": "query"}, "Prompt-Name", "prompt_name"),
        ("/v1/embeddings", {"input": "x", "prompt": "q: "}, "prompt", "instruction"),
        ("/embeddings", {"input": "x", "dims": 12}, "dims", "dimensions"),
        ("/embed", {"inputs": "x", "normalise": False}, "normalise", "normalize"),
        ("/", {"inputs": "x", "promptName": "query"}, "promptName", "prompt_name"),
        ("/v2/embed", {"texts": ["x"], "dimensions": 12}, "dimensions", "output_dimension"),
        ("/v1/embed", {"texts": ["x"], "embedding_type": ["int8"]}, "embedding_type", "embedding_types"),
        ("/api/embed", {"input": "x", "dimension": 12}, "dimension", "dimensions"),
        ("/embedding", {"content": "x", "normalize": False}, "normalize", "embd_normalize"),
        ("/vectors", {"text": "x", "config": {"taskType": "query"}}, "config.taskType", "config.task_type"),
        ("/rerank", {**QUERY, "max_token_per_doc": 3}, "max_token_per_doc", "max_tokens_per_doc"),
        ("/v2/rerank", {**QUERY, "topN": 1}, "topN", "top_n"),
        ("/rerank", {"query": "q", "texts": ["a", "b"], "top_k": 1}, "top_k", "top_n"),
        ("/reranking", {**QUERY, "property": "", "truncat": True}, "truncat", "truncate"),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}], "top_k": 1}, "top_k", "top_n"),
        ("/score", {"text_1": "q", "text_2": ["a"], "raw_score": True}, "raw_score", "raw_scores"),
        ("/tokenize", {"inputs": "x", "add_special_token": False}, "add_special_token", "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "return_tokens_str": True}, "return_tokens_str", "return_token_strs"),
        ("/decode", {"ids": [101], "skip_special_token": False}, "skip_special_token", "skip_special_tokens"),
        ("/jobs", {"project": "p", "total_chunks": 1, "instanceId": "i"}, "instanceId", "instance_id"),
    ],
)
async def test_what_is_misspelt_is_answered_with_a_hint(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], name: str, known: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert meant(response) == {name: known}


@pytest.mark.parametrize(
    ("path", "body", "status", "name", "known"),
    [
        ("/v1/embeddings", {"inputs": "x"}, 400, "inputs", "input"),
        ("/v1/embeddings", {"texts": ["x"]}, 400, "texts", "input"),
        ("/embed", {"input": "x"}, 422, "input", "inputs"),
        ("/v2/embed", {"text": ["x"]}, 400, "text", "texts"),
        ("/api/embed", {"model": "m", "inputs": "x"}, 400, "inputs", "input"),
        ("/api/embeddings", {"model": "m", "input": "x"}, 400, "input", "prompt"),
        ("/embedding", {"input": "x"}, 400, "input", "content"),
        ("/vectors", {"txt": "x"}, 400, "txt", "text"),
        ("/v1/rerank", {"query": "q", "documets": ["a"]}, 400, "documets", "documents"),
        ("/v1/rerank", {"qurey": "q", "documents": ["a"]}, 400, "qurey", "query"),
        ("/rerank", {"search_query": "q", "texts": ["a"]}, 422, "search_query", "query"),
        ("/v1/ranking", {"query": {"txt": "q"}, "passages": [{"text": "a"}]}, 422, "query.txt", "query.text"),
        ("/v1/ranking", {"query": {"text": "q"}, "passage": [{"text": "a"}]}, 422, "passage", "passages"),
        ("/score", {"text1": "q", "text_2": ["a"]}, 400, "text1", "text_1"),
        ("/similarity", {"inputs": {"source": "q", "sentence": ["a"]}}, 422, "inputs.sentence", "inputs.sentences"),
        ("/decode", {"tokens": [101]}, 422, "tokens", "ids"),
        ("/detokenize", {"ids": [101]}, 400, "ids", "tokens"),
        ("/jobs", {"project": "p", "totalChunks": 1}, 400, "totalChunks", "total_chunks"),
        (
            "/v1/batches",
            {"input_file": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"},
            400,
            "input_file",
            "input_file_id",
        ),
    ],
)
async def test_what_is_refused_for_want_of_it_says_so_in_the_error(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, name: str, known: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status
    assert meant(response)[name] == known
    if name != "inputs.sentence":  # the first of several mistakes is named, and it is the other one
        assert f"`{name}` is not read here: did you mean `{known}`?" in response.text


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/embeddings", {"input": "x", "add_special_tokens": False}, "add_special_tokens"),
        ("/embed", {"inputs": "x", "encoding_format": "base64"}, "encoding_format"),
        ("/api/embeddings", {"prompt": "x", "dimensions": 12}, "dimensions"),
        ("/rerank", {**QUERY, "max_chunks_per_doc": 10}, "max_chunks_per_doc"),
        ("/v1/rerank", {**QUERY, "prompt_name": "query"}, "prompt_name"),
        ("/score", {"text_1": "q", "text_2": ["a"], "top_n": 1}, "top_n"),
        ("/rerank", {**QUERY, "chat_template_kwargs": {"instruction": "x"}}, "chat_template_kwargs"),
    ],
)
async def test_what_would_change_the_answer_elsewhere_is_named(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], name: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers[HINT].startswith(f"`{name}` is not read here")
    assert "did you mean" not in response.headers[HINT]


@pytest.mark.parametrize("field", ["images", "messages", "late_chunking", "return_multivector", "return_sparse"])
@pytest.mark.parametrize(
    ("path", "key"),
    [("/v1/embeddings", "input"), ("/embed", "inputs"), ("/v2/embed", "texts"), ("/api/embed", "input")],
)
async def test_what_is_not_a_dense_vector_of_text_is_refused_in_every_dialect(
    client: httpx.AsyncClient, path: str, key: str, field: str
) -> None:
    response = await client.post(path, json={key: ["x"], field: [True]})
    assert response.status_code == (422 if path == "/embed" else 400)
    assert f"`{field}`" in response.text


@pytest.mark.parametrize(("modality", "status"), [("text", 200), (["text"], 200), (None, 200), ("image", 400)])
async def test_modality(client: httpx.AsyncClient, modality: object, status: int) -> None:
    response = await client.post("/v1/embeddings", json={"input": ["x"], "modality": modality})
    assert response.status_code == status
    assert HINT not in response.headers


# Bodies as they were recorded, with what clients add that means nothing here.
ADDED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": ["x"], "model": "m", "user": "u1", "encoding_format": "float", "drop_params": True}),
    ("/v1/embeddings", {"input": ["x"], "output_dtype": None, "output_dimension": None, "truncation": True}),
    ("/v1/embeddings", {"input": ["x"], "model": "m", "encoding_type": "float"}),
    ("/v1/embeddings", {"input": ["x"], "input_type": "passage", "truncate": "NONE", "encoding_format": "float"}),
    ("/embeddings", {"input": ["x"], "model": "m", "dimensions": 0, "modality": "text"}),
    ("/api/embed", {"model": "m", "input": "x", "truncate": True, "keep_alive": "5m", "options": {"num_ctx": None}}),
    ("/", {"inputs": {"source_sentence": "x", "sentences": ["a", "b"]}, "parameters": {}}),
    ("/embed", {"inputs": ["x"], "normalize": True, "truncation_direction": "Right", "prompt_name": None}),
    ("/embed", {"inputs": ["x"], "is_query": True, "job_id": None}),
    ("/vectors", {"text": "x", "dims": 0, "vector": None, "error": "", "config": {"pooling_strategy": "masked_mean"}}),
    ("/v2/embed", {"texts": ["x"], "input_type": "search_query", "embedding_types": ["float"], "truncate": "END"}),
    ("/v2/rerank", {**QUERY, "model": "m", "top_n": 1, "max_tokens_per_doc": None, "max_chunks_per_doc": None}),
    ("/v1/rerank", {**QUERY, "model": "m", "return_documents": "true", "return_len": "true"}),
    ("/v1/rerank", {**QUERY, "model": "m", "top_k": 2, "truncation": True}),
    ("/rerank", {**QUERY, "return_documents": False, "raw_scores": False, "model": "m"}),
    ("/rerank", {"raw_scores": False, "truncate": False, "truncation_direction": "Right", "query": "q", "top_n": 2}
        | {"texts": ["a", "b"], "return_text": True}),
    ("/rerank", {"query": "q", "documents": ["a"], "property": ""}),
    ("/jobs", {"project": "p", "total_chunks": 1, "instance_id": "i"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), ADDED)
async def test_what_clients_add_is_no_mistake(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert HINT not in response.headers


async def test_llamaindex_word_for_the_type_is_read(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/embeddings", json={"input": "x", "encoding_type": "ubinary"})
    assert len(answer.json()["data"][0]["embedding"]) == 384 // 8


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "dimen\r\nX-Evil: 1": 3},
        {"input": "x", "dimension\r\n": 3},
        {"input": "x", "\x00dimensions\x7f": 3},
        {"input": "x", "dimens\u0456ons": 3},
        {"input": "x", "dimensions\U0001f600": 3},
        {"input": "x", "dimensions\u2028": 3, "`dimensions`": 3},
        {"input": "x", "d" * 1_000_000: 3, "dimension": 3},
        {"input": "x", **{f"dimensions{number}": 3 for number in range(10_000)}},
        {"input": "x", **{f"field {number}": "dimension" * 10 for number in range(10_000)}},
        {"input": "x", "": 3, " ": 3, "_": 3, "-": 3},
    ],
    ids=lambda body: ascii(next(name for name in body if name != "input"))[:20],
)
async def test_hostile_names(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post(
        "/v1/embeddings", content=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200
    said = response.headers.get(HINT, "")
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 1500
    assert said.count("is not read here") <= MOST_HINTS
    assert "x-evil" not in response.headers
    assert "dddddddddd" not in said


async def test_a_lone_surrogate_in_a_name(client: httpx.AsyncClient) -> None:
    content = b'{"inputs\\ud83d": "x"}'
    response = await client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400


async def test_no_value_is_repeated(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/embeddings", json={"inputs": "a secret text", "dimension": "another"})
    assert "secret" not in response.text + str(response.headers)
    assert "another" not in response.text + str(response.headers)


async def test_headers_and_query(client: httpx.AsyncClient) -> None:
    for name, known in (
        ("X-JobID", "x-job-id"),
        ("X_Job_Id", "x-job-id"),
        ("X-Owner", None),
        ("X-Job", "x-job-id"),
        ("X-Prioritiy", "x-priority"),
    ):
        response = await client.post("/v1/embeddings", json={"input": "x"}, headers={name: "bulk"})
        assert (meant(response) if known else response.headers.get(HINT)) == ({name.lower(): known} if known else None)
    usual = {"X-Stainless-Lang": "python", "X-Request-ID": "1", "X-Forwarded-For": "1.1.1.1", "X-Client-Name": "c"}
    assert HINT not in (await client.post("/v1/embeddings", json={"input": "x"}, headers=usual)).headers
    assert meant(await client.get("/jobs?stat=active")) == {"stat": "state"}
    assert HINT not in (await client.get("/jobs?state=active&api-version=1")).headers
    assert HINT not in (await client.get(f"/jobs?{'stat=1&' * 2000}")).headers


async def test_a_refused_priority_keeps_its_hint(client: httpx.AsyncClient) -> None:
    body = {"input": "x", "priority": "someday", "dimension": 4}
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert meant(response) == {"dimension": "dimensions"}
    assert "dimension" not in response.text  # it is not what it is refused for


async def test_the_longest_names_that_are_read_can_be_misspelt() -> None:
    names = {name for body in RERANK.values() for name in body.model_fields}
    assert max(map(len, names)) + 2 < LONGEST_NAME


async def test_models_say_which_prompts_can_be_asked_for(client: httpx.AsyncClient) -> None:
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["prompts"] == {"query": "", "document": ""}
    assert model["default_prompt_name"] is None
    for name in model["prompts"]:
        assert (await client.post("/v1/embeddings", json={"input": "x", "prompt_name": name})).status_code == 200
    unknown = await client.post("/v1/embeddings", json={"input": "x", "prompt_name": "nope"})
    assert "these are: document, query." in unknown.json()["message"]
    assert (await client.get("/info")).json()["prompts"] == model["prompts"]


async def test_nothing_is_said_to_a_request_without_a_key() -> None:
    async with serving(api_key="k" * 20) as client:
        response = await client.post("/v1/embeddings", json={"inputs": "x"})
        assert response.status_code == 401
        assert HINT not in response.headers


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_a_word_that_chooses_another_shape_of_the_answer_is_told(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, json={**QUERY, "top_k": 1})
    assert len(answer.json()["data"]) == 1
    assert answer.headers[HINT] == (
        "`top_k` makes this Voyage's call, whose answer has `data`: `top_n` is for an answer with `results`."
    )
    for usual in ({"model": "m", "top_k": 1}, {"model": "m", "top_k": None}, {"top_k": None}):
        assert HINT not in (await client.post(path, json={**QUERY, **usual})).headers


async def test_a_field_of_the_body_in_the_query_is_told(client: httpx.AsyncClient) -> None:
    for path, field, body in (
        ("/v1/embeddings", "dimensions", {"input": "x"}),
        ("/embed", "prompt_name", {"inputs": "x"}),
        ("/rerank", "top_n", QUERY),
    ):
        answer = await client.post(f"{path}?{field}=12&api-version=1", json=body)
        assert answer.status_code == 200
        assert answer.headers[HINT] == f"`{field}` is not read here: it is a field of the body."
