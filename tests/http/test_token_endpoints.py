"""/tokenize, /decode and /detokenize: which dialect is spoken, its shapes, and its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import serving
from tests.tiny_checkpoints import tiny_bert

HELLO = [101, 7592, 2088, 102]


@pytest.fixture(scope="module")
async def prompted(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    prompts = {"query": "search text: ", "passage": "passage: "}
    folder = tiny_bert(tmp_path_factory.mktemp("tokens") / "tiny", minilm_folder, prompts=prompts)
    async with serving(embed_model=str(folder)) as client:
        yield client


async def test_teis_pieces(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"inputs": "hello, worlds"})
    assert answer.json() == [
        [
            {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None},
            {"id": 7592, "text": "hello", "special": False, "start": 0, "stop": 5},
            {"id": 1010, "text": ",", "special": False, "start": 5, "stop": 6},
            {"id": 8484, "text": "worlds", "special": False, "start": 7, "stop": 13},
            {"id": 102, "text": "[SEP]", "special": True, "start": None, "stop": None},
        ]
    ]


async def test_several_texts_and_long_ones_are_not_cut(client: httpx.AsyncClient) -> None:
    token_lists = (await client.post("/tokenize", json={"inputs": ["hello", "word " * 5000], "model": "any"})).json()
    assert list(map(len, token_lists)) == [3, 5002]


async def test_a_prompt_by_name(prompted: httpx.AsyncClient) -> None:
    [pieces] = (await prompted.post("/tokenize", json={"inputs": "hello", "prompt_name": "query"})).json()
    assert [piece["text"] for piece in pieces] == ["[CLS]", "search", "text", ":", "hello", "[SEP]"]
    assert (pieces[4]["start"], pieces[4]["stop"]) == (13, 18)
    refused = await prompted.post("/tokenize", json={"inputs": "hello", "prompt_name": "other"})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
    assert "passage, query" in refused.json()["error"]


async def test_vllms_tokens(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "hello world"})).json()
    assert answer == {"count": 4, "max_model_len": 256, "tokens": HELLO, "token_strs": None}
    body = {"prompt": "hello worldly", "add_special_tokens": False, "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    assert (answer["count"], answer["tokens"][:2]) == (3, HELLO[1:3])
    assert answer["token_strs"] == ["hello", "world", "##ly"]


@pytest.mark.parametrize("text", ["hello world", "", "naïve 😀 你好", "x" * 300])
async def test_vllms_count_is_that_of_an_embedding(client: httpx.AsyncClient, text: str) -> None:
    count = (await client.post("/tokenize", json={"prompt": text})).json()["count"]
    embedded = (await client.post("/v1/embeddings", json={"input": text})).json()
    assert count == embedded["usage"]["prompt_tokens"]


async def test_decode(client: httpx.AsyncClient) -> None:
    assert (await client.post("/decode", json={"ids": HELLO})).json() == ["hello world"]
    several = {"ids": [HELLO, [7592]], "skip_special_tokens": False}
    assert (await client.post("/decode", json=several)).json() == ["[CLS] hello world [SEP]", "hello"]


async def test_detokenize(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/detokenize", json={"tokens": HELLO[1:3]})).json()
    assert answer == {"prompt": "hello world"}


TEI_ERRORS: list[tuple[str, dict[str, Any], int]] = [
    ("/tokenize", {}, 422),
    ("/tokenize", {"inputs": 5}, 422),
    ("/tokenize", {"inputs": [[101]]}, 422),
    ("/tokenize", {"inputs": []}, 400),
    ("/tokenize", {"inputs": ["a"] * 2049}, 422),
    ("/decode", {}, 422),
    ("/decode", {"ids": "hello"}, 422),
    ("/decode", {"ids": ["hello"]}, 422),
    ("/decode", {"ids": [1.5]}, 422),
    ("/decode", {"ids": [True]}, 422),
    ("/decode", {"ids": []}, 400),
    ("/decode", {"ids": [[101], []]}, 422),
    ("/decode", {"ids": [30522]}, 422),
    ("/decode", {"ids": [-1]}, 422),
    ("/decode", {"ids": [10**30]}, 422),
]


@pytest.mark.parametrize(("path", "body", "status"), TEI_ERRORS)
async def test_teis_errors(client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error_type"] == ("Empty" if status == 400 else "Validation")
    assert answer.json()["error"]


VLLM_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": ["a"]}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "hello"}, "tokens"),
    ("/detokenize", {"tokens": [5, "hello"]}, "tokens"),
    ("/detokenize", {"tokens": [30522]}, "tokens[0]"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {"tokens": [[5], []]}, "tokens[1]"),
]


@pytest.mark.parametrize(("path", "body", "param"), VLLM_ERRORS)
async def test_vllms_errors(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_ids_outside_the_vocabulary_are_named(client: httpx.AsyncClient) -> None:
    answer = await client.post("/decode", json={"ids": [[101], [5, 30522]]})
    assert "`ids[1]`" in answer.json()["error"]
    assert "outside 0..30521, the vocabulary of" in answer.json()["error"]


async def test_an_unknown_model_is_a_404_in_the_dialects_shape() -> None:
    async with serving(strict_model=True) as client:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
            answer = await client.post(path, json={**body, "model": "other"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        for path, body in (("/tokenize", {"inputs": "a"}), ("/decode", {"ids": [5]})):
            answer = await client.post(path, json={**body, "model": "other"})
            assert answer.status_code == 404
            assert set(answer.json()) == {"error", "error_type"}
