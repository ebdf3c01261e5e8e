"""Cutting a text from either end, to the model's length or the request's, equals the tokenizers library's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.models.loaded import GOLDEN, load_model, text_tokenizer
from tests.tiny_checkpoints import plain_tokenizer
from vecmill.core.errors import InvalidInput
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Side, Truncation
from vecmill.inference.text_tokenizer import TextTokenizer, Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.family import TextFormat
from vecmill.models.tokenizer_files import read_file

LIMIT, VOCAB = 32, 30522
CLS, SEP = 101, 102
PROMPT = "search query: "
ENDLESS = [
    "word " * 200_000,
    "x" * 1_000_000,
    "begin " + " " * 300_000 + "end",
    "好" * 100_000,
    "head " + "Berlin has museums, " * 50_000 + "tail",
]


@pytest.fixture(scope="module")
def tokenizer(minilm_folder: Path) -> Iterator[TextTokenizer]:
    with WorkerThreads(2) as threads:
        pool = TokenizerPool(read_file(minilm_folder / "tokenizer.json"), VOCAB, LIMIT, threads)
        yield TextTokenizer(pool, TextFormat(), LIMIT, VOCAB)


@pytest.fixture(scope="module")
def own(minilm_folder: Path) -> Tokenizer:
    return plain_tokenizer(minilm_folder)


def cut_by(own: Tokenizer, text: str, limit: int, side: Side) -> list[int]:
    """The library's ids."""
    own.enable_truncation(limit, direction=side.value)
    ids: list[int] = own.encode(text).ids
    own.no_truncation()
    return ids


def bare(own: Tokenizer, text: str) -> list[int]:
    ids: list[int] = own.encode(text, add_special_tokens=False).ids
    return ids


def ids_of(tokenized: Tokenized) -> list[int]:
    ids: list[int] = tokenized.row.token_ids.tolist()
    return ids


words = st.sampled_from(["def", "return", "naïve", "你好", "x" * 120, "  ", "\n", "😀", "a-b", "antidisestablishment"])
texts = st.lists(words, max_size=60).map(" ".join) | st.text(max_size=200)
sides = st.sampled_from(list(Side))


@settings(deadline=None)
@given(text=texts, limit=st.integers(3, 2 * LIMIT), side=sides)
async def test_any_text_and_limit(tokenizer: TextTokenizer, own: Tokenizer, text: str, limit: int, side: Side) -> None:
    [tokenized] = await tokenizer.encode([text], truncation=Truncation(side=side, max_tokens=limit))
    ids, whole, most = ids_of(tokenized), bare(own, text), min(limit, LIMIT)
    assert len(ids) <= most
    assert (ids[0], ids[-1]) == (CLS, SEP)
    kept = ids[1:-1]
    assert kept == (whole[: len(kept)] if side is Side.RIGHT else whole[len(whole) - len(kept) :])
    assert ids == cut_by(own, text, most, side)
    assert tokenized.truncated == (len(whole) + 2 > most)


@settings(deadline=None)
@given(text=texts, limit=st.integers(3, 2 * LIMIT), side=sides)
async def test_ids_are_cut_as_texts_are(
    tokenizer: TextTokenizer, own: Tokenizer, text: str, limit: int, side: Side
) -> None:
    truncation = Truncation(side=side, max_tokens=limit)
    given_ids = [CLS, *bare(own, text), SEP]
    [tokenized] = tokenizer.check([given_ids], "input", truncation)
    [of_text] = await tokenizer.encode([text], truncation=truncation)
    assert (ids_of(tokenized), tokenized.total, tokenized.truncated) == (
        ids_of(of_text),
        of_text.total,
        of_text.truncated,
    )


@pytest.mark.parametrize("text", ENDLESS, ids=lambda text: text[:6])
async def test_an_endless_text_is_cut_on_the_left(tokenizer: TextTokenizer, own: Tokenizer, text: str) -> None:
    whole = bare(own, text)
    [tokenized] = await tokenizer.encode([text], truncation=Truncation(side=Side.LEFT))
    assert ids_of(tokenized) == [CLS, *whole[-(LIMIT - 2) :], SEP]
    assert tokenized.too_long == (len(whole) > LIMIT - 2)
    assert tokenized.total <= min(len(whole) + 2, 10_000)  # no more was tokenized


@pytest.mark.parametrize("text", [*ENDLESS, "short", "a b " * 40, "", f"{PROMPT}prefixed already " + "b " * 50])
async def test_the_prompt_stays_when_the_left_is_cut(tokenizer: TextTokenizer, own: Tokenizer, text: str) -> None:
    [tokenized] = await tokenizer.encode([text], PROMPT, Truncation(side=Side.LEFT))
    prompt, whole = bare(own, PROMPT), bare(own, text.removeprefix(PROMPT))
    kept = whole[-(LIMIT - 2 - len(prompt)) :]
    assert ids_of(tokenized) == [CLS, *prompt, *kept, SEP]


@pytest.mark.parametrize("long", [False, True])
async def test_of_a_prompt_that_ends_in_a_space_no_token_of_the_text_stays(long: bool) -> None:
    """Alone its last token is the space; before a text the space is the first word's."""
    loaded = load_model(GOLDEN / "qwen3" / "embedding")
    prompt, text = "Query: ", "what is the capital of China " * (1000 if long else 30) + "the end"
    with text_tokenizer(loaded, 24) as tokenizer:
        [tokenized] = await tokenizer.encode([text], prompt, Truncation(side=Side.LEFT))
        alone, whole = tokenizer.pool.encode(prompt), tokenizer.pool.encode(prompt + text)
        _, end = tokenizer.around
    start = len(tokenizer.pool.encode("Query:"))
    assert start < len(alone)
    assert whole[:start] == alone[:start]
    assert whole[start] != alone[start]
    assert ids_of(tokenized) == [*whole[:start], *whole[start - (24 - len(end)) :], *end]


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("words", [3, 300, 30_000])
async def test_nv_embeds_instruction_stays_and_is_not_pooled(side: Side, words: int) -> None:
    loaded = load_model(GOLDEN / "nvembed" / "checkpoint")
    prompt = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    text = "the quick brown fox " * words
    with text_tokenizer(loaded, 128) as tokenizer:
        [tokenized] = await tokenizer.encode([text], prompt, Truncation(side=side))
        alone, whole = tokenizer.pool.encode(prompt), tokenizer.pool.encode(prompt + text)
        before, after = tokenizer.around
    ids = ids_of(tokenized)
    assert tokenized.row.unpooled == len(alone)
    assert len(ids) == min(128, len(whole) + len(before) + len(after))
    assert ids[: tokenized.row.unpooled] == [*before, *whole][: tokenized.row.unpooled]
    if side is Side.LEFT:
        assert ids[-len(after) :] == after
        rest = ids[tokenized.row.unpooled : -len(after)]
        assert rest == whole[len(whole) - len(rest) :]
    else:
        assert ids == [*before, *whole, *after][:128]


async def test_what_the_request_cuts_is_no_error_where_it_may_cut(tokenizer: TextTokenizer) -> None:
    text = "a " * 20
    for allowed in (None, True):
        [tokenized] = await tokenizer.encode([text], truncation=Truncation(allowed, max_tokens=10))
        assert (len(tokenized.row), tokenized.truncated, tokenized.too_long) == (10, True, False)
    [refused] = await tokenizer.encode([text], truncation=Truncation(False, max_tokens=10))
    assert (refused.truncated, refused.too_long, refused.total) == (True, True, 22)
    for limit in (22, 23, LIMIT, 1000):
        [whole] = await tokenizer.encode([text], truncation=Truncation(False, max_tokens=limit))
        assert (len(whole.row), whole.truncated, whole.total) == (22, False, 22)


async def test_a_limit_beyond_the_models_does_not_hide_what_the_model_cuts(tokenizer: TextTokenizer) -> None:
    [tokenized] = await tokenizer.encode(["a " * 40], truncation=Truncation(max_tokens=1000))
    assert (len(tokenized.row), tokenized.total, tokenized.too_long) == (LIMIT, 42, True)


@pytest.mark.parametrize(("limit", "prompt"), [(1, ""), (2, ""), (2, PROMPT), (5, PROMPT)])
@pytest.mark.parametrize("side", list(Side))
async def test_a_limit_without_room_for_a_text_is_refused(
    tokenizer: TextTokenizer, limit: int, prompt: str, side: Side
) -> None:
    needed = 3 + (3 if prompt else 0)
    truncation = Truncation(side=side, max_tokens=limit)
    with pytest.raises(InvalidInput, match=rf"limit of {limit} tokens .*no room.* at least {needed}\."):
        await tokenizer.encode(["text"], prompt, truncation)
    [tokenized] = await tokenizer.encode(["text"], prompt, Truncation(side=side, max_tokens=needed))
    assert len(tokenized.row) == needed
    if not prompt:
        with pytest.raises(InvalidInput, match="no room"):
            tokenizer.check([[CLS, 1037, 1038, SEP]], "input", truncation)
