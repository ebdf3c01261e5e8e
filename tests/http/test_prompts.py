"""Every way in which clients say query or document gives the model's own prompt, and nothing said gives none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import serving
from tests.oracle import st_encode
from tests.tiny_checkpoints import tiny_bert

PROMPTS = {"query": "search_query: ", "passage": "search_document: ", "classification": "classify: "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("prompted") / "tiny", minilm_folder, prompts=PROMPTS)


@pytest.fixture(scope="module")
async def prompted(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(embed_model=str(folder)) as client:
        yield client


WAYS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"is_query": True}, "query"),
    ({"is_query": False}, "passage"),
    ({"prompt_name": "query"}, "query"),
    ({"prompt_name": "document"}, "passage"),
    ({"prompt_name": "classification"}, "classification"),
    ({"input_type": "query"}, "query"),
    ({"input_type": "passage"}, "passage"),
    ({"input_type": "search_query"}, "query"),
    ({"input_type": "search_document"}, "passage"),
    ({"input_type": "DOCUMENT"}, "passage"),
    ({"input_type": "classification"}, "classification"),
    ({"input_type": "clustering"}, ""),
    ({"task": "retrieval.query"}, "query"),
    ({"task": "retrieval.passage"}, "passage"),
    ({"task": "text-matching"}, ""),
    ({"model": "tiny-query"}, "query"),
    ({"model": "tiny-passage"}, "passage"),
    ({"model": "tiny-document"}, "passage"),
    ({"model": "tiny-query", "input_type": "passage"}, "passage"),
    ({"prompt_name": "classification", "task": "classification"}, "classification"),
    ({"prompt_name": "query", "is_query": True, "input_type": "search_query", "task": "retrieval.query"}, "query"),
    ({"prompt_name": "document", "is_query": False}, "passage"),
    ({"task": None, "input_type": None, "prompt_name": None, "is_query": None, "instruction": None}, ""),
]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed"])
@pytest.mark.parametrize(("fields", "prompt"), WAYS)
async def test_every_way_to_say_it(
    prompted: httpx.AsyncClient, folder: Path, path: str, fields: dict[str, Any], prompt: str
) -> None:
    key = "input" if path.startswith("/v1") else "inputs"
    answer = (await prompted.post(path, json={key: ["a text"], **fields})).json()
    found = answer[0] if path == "/embed" else answer["data"][0]["embedding"]
    np.testing.assert_allclose(found, st_encode(folder, ["a text"], prompt=PROMPTS.get(prompt, ""))[0], atol=1e-5)


async def test_an_instruction_of_the_request_wins(prompted: httpx.AsyncClient, folder: Path) -> None:
    for instruction in ("Find code: ", ""):
        body = {"inputs": "a text", "instruction": instruction, "is_query": True, "prompt_name": "query"}
        found = (await prompted.post("/embed", json=body)).json()[0]
        np.testing.assert_allclose(found, st_encode(folder, ["a text"], prompt=instruction)[0], atol=1e-5)


async def test_what_begins_with_the_prompt_is_not_prefixed_twice(prompted: httpx.AsyncClient) -> None:
    bodies = [{"inputs": text, "is_query": True} for text in ("search_query: a text", "a text")]
    twice, once = [(await prompted.post("/embed", json=body)).json() for body in bodies]
    assert twice == once


@pytest.mark.parametrize(
    ("fields", "param", "known"),
    [
        ({"prompt_name": "nope"}, "prompt_name", "classification, document, passage, query"),
        ({"input_type": "nope"}, "input_type", "search_query"),
        ({"task": "nope"}, "task", "retrieval.query"),
    ],
)
async def test_what_is_not_known_is_a_400_with_what_is(
    prompted: httpx.AsyncClient, fields: dict[str, str], param: str, known: str
) -> None:
    answer = await prompted.post("/v1/embeddings", json={"input": "x", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert known in answer.json()["error"]["message"]


async def test_token_ids_carry_no_prompt(prompted: httpx.AsyncClient) -> None:
    bodies = [{"inputs": [[7592, 2088]], **fields} for fields in ({}, {"is_query": True})]
    plain, asked = [(await prompted.post("/embed", json=body)).json() for body in bodies]
    assert plain == asked


async def test_the_servers_instruction_replaces_a_whole_prompt_without_a_place_for_it(folder: Path) -> None:
    async with serving(embed_model=str(folder), query_instruction="Find code: ") as client:
        for is_query, prompt in ((True, "Find code: "), (False, PROMPTS["passage"])):
            found = (await client.post("/embed", json={"inputs": "a text", "is_query": is_query})).json()[0]
            np.testing.assert_allclose(found, st_encode(folder, ["a text"], prompt=prompt)[0], atol=1e-5)


async def test_a_model_without_prompts_stays_without(minilm_folder: Path) -> None:
    async with serving(query_instruction="Find code: ") as client:
        found = (await client.post("/embed", json={"inputs": "a text", "is_query": True})).json()[0]
    np.testing.assert_allclose(found, st_encode(minilm_folder, ["a text"])[0], atol=1e-5)


CARDS = {
    "bge-small-en-v1.5": "Represent this sentence for searching relevant passages: ",
    "e5-base-v2": "query: ",
    "multilingual-e5-large": "query: ",
    "multilingual-e5-large-instruct": "Instruct: Given a web search query, retrieve relevant passages that answer the "
    "query\nQuery: ",
    "gte-base": "",
    "bge-m3": "",
}


@pytest.mark.parametrize("name", CARDS)
async def test_the_cards_prompt_where_the_files_say_none(tmp_path: Path, minilm_folder: Path, name: str) -> None:
    folder = tiny_bert(tmp_path / name, minilm_folder)
    async with serving(embed_model=str(folder)) as client:
        found = (await client.post("/embed", json={"inputs": "a text", "is_query": True})).json()[0]
    np.testing.assert_allclose(found, st_encode(folder, ["a text"], prompt=CARDS[name])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("truncate", "status"), [("END", 200), ("NONE", 400), ("START", 200), (True, 200), (False, 400)]
)
async def test_truncate_in_nims_words(prompted: httpx.AsyncClient, truncate: object, status: int) -> None:
    answer = await prompted.post("/v1/embeddings", json={"input": "word " * 200, "truncate": truncate})
    assert answer.status_code == status


async def test_models_list_what_prompt_name_may_be(prompted: httpx.AsyncClient, folder: Path) -> None:
    [model] = (await prompted.get("/v1/models")).json()["data"]
    assert model["prompts"] == {**PROMPTS, "document": PROMPTS["passage"]}
    for name, text in model["prompts"].items():
        answer = (await prompted.post("/embed", json={"inputs": "a text", "prompt_name": name})).json()
        np.testing.assert_allclose(answer[0], st_encode(folder, ["a text"], prompt=text)[0], atol=1e-5)
