"""Two fields of a request that say one thing in two ways: where they disagree, the request is refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from vecmill.core.errors import InvalidInput
from vecmill.http.dialects.cohere import CohereEmbedBody
from vecmill.http.dialects.openai import EmbeddingsBody

EMBED: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"task": "retrieval.query", "input_type": "passage"}, ("task", "input_type")),
    ({"task": "retrieval.query", "input_type": "clustering"}, ("task", "input_type")),
    ({"input_type": "query", "is_query": False}, ("input_type", "is_query")),
    ({"task": "classification", "is_query": True}, ("task", "is_query")),
    ({"task": "retrieval.query", "prompt_name": "document"}, ("task", "prompt_name")),
    ({"input_type": "query", "prompt_name": "own"}, ("input_type", "prompt_name")),
    ({"is_query": True, "prompt_name": "classification"}, ("is_query", "prompt_name")),
    ({"truncate": True, "truncation": False}, ("truncate", "truncation")),
    ({"truncate": "NONE", "truncation": True}, ("truncate", "truncation")),
    ({"truncate": "START", "truncation_side": "right"}, ("truncate", "truncation_side")),
    ({"truncate": "END", "truncation_direction": "Left"}, ("truncate", "truncation_direction")),
    ({"truncation_side": "left", "truncation_direction": "Right"}, ("truncation_side", "truncation_direction")),
]
OF_OPENAI: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"dimensions": 4, "output_dimension": 8}, ("dimensions", "output_dimension")),
    ({"encoding_format": "float", "embedding_type": "base64"}, ("encoding_format", "embedding_type")),
    ({"embedding_type": "int8", "output_dtype": "binary"}, ("embedding_type", "output_dtype")),
    ({"embedding_type": "int8", "encoding_type": "float"}, ("embedding_type", "encoding_type")),
    ({"normalize": True, "normalized": False}, ("normalize", "normalized")),
    ({"normalized": False, "use_activation": True}, ("normalized", "use_activation")),
]
PATHS: dict[str, tuple[dict[str, Any], int]] = {
    "/v1/embeddings": ({"input": "a text"}, 400),
    "/embed": ({"inputs": "a text"}, 422),
    "/v2/embed": ({"texts": ["a text"]}, 400),
    "/api/embed": ({"input": "a text"}, 400),
    "/embedding": ({"content": "a text"}, 400),
    "/vectors": ({"text": "a text"}, 400),
}
QUERY: dict[str, Any] = {"query": "a query"}
RERANK: list[tuple[str, dict[str, Any], tuple[str, str], int]] = [
    ("/v1/rerank", {**QUERY, "documents": ["a", "b"], "top_n": 1, "top_k": 2}, ("top_n", "top_k"), 400),
    ("/rerank", {**QUERY, "documents": ["a"], "texts": ["b"]}, ("documents", "texts"), 422),
    (
        "/v1/ranking",
        {"query": {"text": "a"}, "passages": [{"text": "b"}], "documents": []},
        ("documents", "passages"),
        422,
    ),
    (
        "/v2/rerank",
        {**QUERY, "documents": ["a"], "truncate": False, "truncation": True},
        ("truncate", "truncation"),
        400,
    ),
    ("/score", {"text_1": "a", "queries": "b", "text_2": "c"}, ("text_1", "queries"), 400),
    (
        "/score",
        {"text_1": "a", "text_2": "b", "raw_scores": True, "use_activation": True},
        ("raw_scores", "use_activation"),
        400,
    ),
    ("/v2/embed", {"texts": ["a"], "inputs": [{"content": [{"type": "text", "text": "b"}]}]}, ("texts", "inputs"), 400),
    (
        "/v2/embed",
        {"texts": ["a"], "max_tokens": 5, "truncate_prompt_tokens": 6},
        ("max_tokens", "truncate_prompt_tokens"),
        400,
    ),
    ("/vectors", {"text": "a", "texts": ["b"]}, ("text", "texts"), 400),
    (
        "/vectors",
        {"text": "a", "input_type": "query", "config": {"task_type": "passage"}},
        ("config.task_type", "input_type"),
        400,
    ),
    ("/api/show", {"model": "all-minilm", "name": "another"}, ("model", "name"), 400),
    (
        "/similarity",
        {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"truncate": True, "truncation": False}},
        ("truncate", "truncation"),
        422,
    ),
]


def assert_refused(answer: httpx.Response, names: tuple[str, str], status: int) -> None:
    assert answer.status_code == status, answer.text
    assert f"`{names[0]}` and `{names[1]}` contradict each other: leave one of them out." in answer.text


@pytest.mark.parametrize("path", PATHS)
async def test_an_embedding_that_contradicts_itself(client: httpx.AsyncClient, path: str) -> None:
    """In the shape of each dialect."""
    body, status = PATHS[path]
    for fields, names in EMBED:
        assert_refused(await client.post(path, json=body | fields), names, status)
    shape = (await client.post(path, json=body | EMBED[0][0])).json()
    unknown = (await client.post(path, json=body | {"prompt_name": "nothing"})).json()
    assert shape.keys() == unknown.keys()


@pytest.mark.parametrize(("fields", "names"), OF_OPENAI)
async def test_openais_body(client: httpx.AsyncClient, fields: dict[str, Any], names: tuple[str, str]) -> None:
    assert_refused(await client.post("/v1/embeddings", json={"input": "a text", **fields}), names, 400)


@pytest.mark.parametrize(("path", "body", "names", "status"), RERANK)
async def test_other_calls(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], names: tuple[str, str], status: int
) -> None:
    assert_refused(await client.post(path, json=body), names, status)


AGREEING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": "a", "task": "retrieval.query", "input_type": "query", "is_query": True}),
    ("/v1/embeddings", {"input": "a", "truncate": True, "truncation": True, "truncate_prompt_tokens": -1}),
    ("/v1/embeddings", {"input": "a", "truncate": "END", "truncation_side": "right"}),
    ("/v1/embeddings", {"input": "a", "normalize": True, "normalized": True, "use_activation": None}),
    ("/v1/embeddings", {"input": "a", "embedding_type": "int8", "output_dtype": "int8", "encoding_format": "float"}),
    ("/rerank", {**QUERY, "texts": ["a"], "truncate": False, "truncation_direction": "Right", "documents": None}),
    ("/v1/rerank", {**QUERY, "documents": ["a", "b"], "top_n": 1, "top_k": 1}),
    ("/v1/rerank", {**QUERY, "documents": ["a"], "texts": True, "top_n": 1}),
    ("/score", {"text_1": "a", "queries": "a", "text_2": "b", "raw_scores": True, "activation": False}),
    ("/vectors", {"text": "a", "input_type": "query", "config": {"task_type": "query"}}),
]


@pytest.mark.parametrize(("path", "body"), AGREEING)
async def test_what_agrees_is_answered(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text


async def test_an_sdk_asks_for_base64_whatever_else_is_asked_for(client: httpx.AsyncClient) -> None:
    body = {"input": "a text", "encoding_format": "base64", "embedding_type": "float"}
    answer = await client.post("/v1/embeddings", json=body)
    assert isinstance(answer.json()["data"][0]["embedding"], str)


@pytest.mark.parametrize("body", [EmbeddingsBody, CohereEmbedBody])
def test_lines_of_batches_are_refused_by_the_same_words(body: type[EmbeddingsBody]) -> None:
    fields = {"input": ["a"], "texts": ["a"], "task": "retrieval.query", "input_type": "passage"}
    with pytest.raises(InvalidInput, match="`task` and `input_type` contradict each other"):
        body.model_validate(fields).prompt_choice()
