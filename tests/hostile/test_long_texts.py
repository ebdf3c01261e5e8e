"""Texts without end are cut as the reference cuts them, without reading more of them than that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.hostile.stalls import LONGEST_STALL, longest_stall, memory_taken
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import plain_tokenizer, tiny_xlm_roberta
from vecmill.core.threads import WorkerThreads
from vecmill.inference.token_ids import MOST_SHOWN
from vecmill.inference.tokenizer_pool import LONGEST_STRETCH, TokenizerPool
from vecmill.models.tokenizer_files import read_file

pytestmark = pytest.mark.slow

MB = 1_000_000
LIMIT = 24
# One word, spaces, characters that are dropped, unknown ones, what is normalised to more, what is not.
RUNS = ["x", " ", "\n", "\u200b", "\u0301", "\u2603", "\ufdfa", "好", "=", "ab", "a b ", "\u0000"]


@contextmanager
def pool_of(folder: Path, limit: int = LIMIT) -> Iterator[tuple[TokenizerPool, Tokenizer]]:
    own = plain_tokenizer(folder)
    with WorkerThreads(1) as threads:
        yield TokenizerPool(read_file(folder / "tokenizer.json"), own.get_vocab_size(), limit, threads), own


@pytest.fixture(scope="module", params=["bert", "xlm-roberta", "qwen3", "nv-embed"])
def pools(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path
) -> Iterator[tuple[TokenizerPool, Tokenizer]]:
    folder = {"bert": minilm_folder, "qwen3": GOLDEN / "qwen3/embedding", "nv-embed": GOLDEN / "nvembed/checkpoint"}
    if request.param == "xlm-roberta":
        folders = tiny_xlm_roberta(tmp_path_factory.mktemp("xlm") / "tiny")
    else:
        folders = folder[request.param]
    with pool_of(folders) as both:
        yield both


runs = st.tuples(st.sampled_from(RUNS), st.sampled_from([1, 3, 300, LONGEST_STRETCH, 5 * LONGEST_STRETCH, 40_000]))
words = st.sampled_from(["def", "naïve", " 你好", ", ", " end", "\n", "☃ ", " x"])
long_texts = st.lists(runs.map(lambda run: run[0] * run[1]) | words, min_size=1, max_size=8).map("".join)


@settings(deadline=None, max_examples=40)
@given(text=long_texts)
def test_both_ends_of_any_long_text_are_the_librarys(pools: tuple[TokenizerPool, Tokenizer], text: str) -> None:
    pool, own = pools
    whole = own.encode(text, add_special_tokens=False).ids
    [beginning], [end] = pool.encode_part([text]), pool.encode_part_from_end([text])
    assert beginning[:LIMIT] == whole[:LIMIT]
    assert end[-LIMIT:] == whole[-LIMIT:]
    assert (len(beginning) > LIMIT) == (len(end) > LIMIT) == (len(whole) > LIMIT)


@settings(deadline=None, max_examples=20)
@given(text=long_texts, prompt=st.sampled_from(["query: ", "x" * 3000, "Instruct: a\nQuery:"]))
def test_a_prompt_before_a_long_text(pools: tuple[TokenizerPool, Tokenizer], text: str, prompt: str) -> None:
    pool, own = pools
    [ids] = pool.encode_part([text], lambda text: prompt)
    assert ids[:LIMIT] == own.encode(prompt + text, add_special_tokens=False).ids[:LIMIT]


@pytest.mark.parametrize("run", RUNS)
def test_a_word_after_eight_million_characters_counts(minilm_folder: Path, run: str) -> None:
    """A long run of characters that give few tokens is skipped, and only a small part of it is tokenized."""
    with pool_of(minilm_folder, 256) as (pool, own):
        many, few = f"begin {run * (8 * MB // len(run))} end", f"begin {run * (10_000 // len(run))} end"
        for encode in (pool.encode_part, pool.encode_part_from_end):
            with memory_taken() as memory:
                [[actual], [expected]] = encode([many]), encode([few])
            count = len(own.encode(few, add_special_tokens=False).ids)
            if count > 256:
                assert len(actual) > 256
            else:
                assert actual == expected == own.encode(few, add_special_tokens=False).ids
            assert memory.highest < 60 * MB


LONG: dict[str, str] = {
    "one word": "x" * (8 * MB),
    "spaces": " " * (8 * MB),
    "one word, then another": "x" * (4 * MB) + " hello",
    "a ligature of eighteen": "\ufdfa" * MB,
    "accents": "e" + "\u0301" * (2 * MB),
    "words": "word " * MB,
    "ideographs": "好" * MB,
}


def of_texts(text: str) -> list[tuple[str, dict[str, Any]]]:
    half = text[: len(text) // 2]
    return [
        ("/v1/embeddings", {"input": [half, half], "instruction": "search: "}),
        ("/embed", {"inputs": text, "truncation_direction": "Left"}),
        ("/rerank", {"query": half, "texts": [half, "b"]}),
        ("/v1/score", {"text_1": "a", "text_2": [text]}),
        ("/similarity", {"inputs": {"source_sentence": half, "sentences": [half]}}),
    ]


@pytest.mark.parametrize("name", LONG)
async def test_nobody_waits_for_a_text_without_end(client: httpx.AsyncClient, name: str) -> None:
    text = LONG[name]
    for path, body in of_texts(text):
        async with longest_stall() as stall:
            answer = await client.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text[:200])
        assert stall.seconds < LONGEST_STALL, path


async def test_a_long_texts_vector_is_that_of_its_beginning(client: httpx.AsyncClient) -> None:
    """An unknown word, however long, and what follows it."""
    many, few = ["x" * n + " hello" + " " * n + "world" for n in (3 * MB, 1000)]
    body = {"input": [many, few]}
    of_whole, of_beginning = [
        entry["embedding"] for entry in (await client.post("/v1/embeddings", json=body)).json()["data"]
    ]
    np.testing.assert_allclose(of_whole, of_beginning, atol=1e-6)


async def test_many_long_texts_at_once(client: httpx.AsyncClient) -> None:
    texts = [f"{index} " + "x" * 80_000 for index in range(60)]
    async with longest_stall() as stall:
        answer = await client.post("/v1/embeddings", json={"input": texts})
    assert answer.status_code == 200
    assert stall.seconds < LONGEST_STALL


@pytest.mark.parametrize("text", ["x" * (8 * MB), " " * (8 * MB), "a " * (4 * MB)], ids=["word", "spaces", "words"])
async def test_where_truncation_is_refused_so_is_a_text_without_end(client: httpx.AsyncClient, text: str) -> None:
    async with longest_stall() as stall:
        answer = await client.post("/embed", json={"inputs": text, "truncate": False})
    # One unknown word, or nothing but spaces, is a short text.
    assert answer.status_code == (400 if text.startswith("a ") else 200)
    assert stall.seconds < LONGEST_STALL


SHOWN: Sequence[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"inputs": "x" * (MOST_SHOWN + 1)}),
    ("/tokenize", {"inputs": ["a" * 1000] * (MOST_SHOWN // 1000 + 1)}),
    ("/tokenize", {"prompt": "x" * (8 * MB)}),
    ("/tokenize", {"inputs": "好" * (MOST_SHOWN - 1)}),
]


@pytest.mark.parametrize(("path", "body"), SHOWN)
async def test_what_cannot_be_shown_whole_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    async with longest_stall() as stall:
        answer = await client.post(path, json=body)
    assert answer.status_code in (400, 413, 422)
    assert f"{MOST_SHOWN} are possible" in answer.text
    assert stall.seconds < LONGEST_STALL


@pytest.mark.parametrize("text", ["x" * MOST_SHOWN, "a, " * (MOST_SHOWN // 3), " " * MOST_SHOWN])
async def test_what_can_be_shown_stalls_nobody(client: httpx.AsyncClient, text: str) -> None:
    async with longest_stall() as stall:
        answer = await client.post("/tokenize", json={"prompt": text})
    assert answer.status_code == 200
    assert stall.seconds < LONGEST_STALL
