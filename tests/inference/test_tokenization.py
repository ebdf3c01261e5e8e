"""Token ids equal the tokenizer's own, cut where they must be, for short texts and endless ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import tiny_xlm_roberta
from vecmill.core.errors import InvalidInput, StartupError
from vecmill.core.threads import WorkerThreads
from vecmill.inference.text_tokenizer import TextTokenizer
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.family import TextFormat
from vecmill.models.tokenizer_files import read_file

LIMIT, VOCAB = 32, 30522


@pytest.fixture(scope="module")
def own(minilm_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(minilm_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(minilm_folder: Path) -> Iterator[TextTokenizer]:
    with WorkerThreads(2) as threads:
        pool = TokenizerPool(read_file(minilm_folder / "tokenizer.json"), VOCAB, LIMIT, threads)
        yield TextTokenizer(pool, TextFormat(), LIMIT, VOCAB)


words = st.sampled_from(
    ["def", "return", "naïve", "你好", "x" * 120, "  ", "\n", "antidisestablishmentarianism", "😀", "a-b"]
)


@settings(deadline=None)
@given(text=st.lists(words, max_size=400).map(" ".join) | st.text(max_size=300))
async def test_ids_equal_the_librarys_own_truncation(tokenizer: TextTokenizer, own: Tokenizer, text: str) -> None:
    [tokenized] = await tokenizer.encode([text])
    assert tokenized.row.token_ids.tolist() == own.encode(text).ids


async def test_an_endless_text_is_cut_the_same_without_reading_it_all(tokenizer: TextTokenizer, own: Tokenizer) -> None:
    for text in ("word " * 1_000_000, "x" * 1_000_000, " " * 300_000 + "tail", "好" * 100_000):
        [tokenized] = await tokenizer.encode([text])
        assert tokenized.row.token_ids.tolist() == own.encode(text[:400_000]).ids


async def test_order_is_kept_over_many_texts(tokenizer: TextTokenizer, own: Tokenizer) -> None:
    texts = [f"text {index}" * (1 + index % 200) for index in range(700)]
    tokenized = await tokenizer.encode(texts)
    assert [entry.row.token_ids.tolist() for entry in tokenized] == [own.encode(text).ids for text in texts]


async def test_truncation_is_known(tokenizer: TextTokenizer) -> None:
    short, exact, long = await tokenizer.encode(["a", "a " * (LIMIT - 2), "a " * (LIMIT - 1)])
    assert (short.truncated, exact.truncated, long.truncated) == (False, False, True)
    assert (short.total, exact.total, long.total) == (3, LIMIT, LIMIT + 1)


@pytest.mark.parametrize("ids", [[VOCAB], [-1], [101, 5, 10**9]])
def test_ids_outside_the_vocabulary_are_refused_by_name(tokenizer: TextTokenizer, ids: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"input\[1\].*0\.\.30521.*check_embedding_ctx_length"):
        tokenizer.check([[1], ids], "input")


@pytest.mark.parametrize("vocab_size", [1000, VOCAB - 1, 250_002])
def test_a_tokenizer_of_another_model_is_refused(minilm_folder: Path, vocab_size: int) -> None:
    with WorkerThreads(1) as threads, pytest.raises(StartupError, match="belongs to another model"):
        TokenizerPool(read_file(minilm_folder / "tokenizer.json"), vocab_size, LIMIT, threads)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE"}}', '{"model": {"type": "?", "vocab": {}}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with WorkerThreads(1) as threads, pytest.raises(StartupError, match="is not a tokenizer"):
        TokenizerPool(read_file(tmp_path / "tokenizer.json"), 10, LIMIT, threads)


TRICKS = ["a </s> b", "</s></s>", "a<s>b", "x [SEP] y", "[CLS][SEP]", "<mask> [MASK]", "<pad>"]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
async def test_without_control_tokens_no_text_has_any(tmp_path: Path, minilm_folder: Path, kind: str) -> None:
    folder = minilm_folder if kind == "bert" else tiny_xlm_roberta(tmp_path / "xlm")
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    control = {token["id"]: token["content"] for token in definition["added_tokens"]}
    control = {number: content for number, content in control.items() if content not in ("[UNK]", "<unk>")}
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    with WorkerThreads(1) as threads:
        obeying, plain = (
            TokenizerPool(read_file(folder / "tokenizer.json"), vocabulary, LIMIT, threads, control_tokens=allowed)
            for allowed in (True, False)
        )
        read = await obeying.encode_batch([*TRICKS, *control.values()])
        assert {number for ids in read for number in ids} >= set(control)
        for ids in await plain.encode_batch([*TRICKS, *control.values()]):
            assert not set(ids) & set(control)
        ordinary = ["def add(a, b): return a + b", "naïve", "What is the capital of China?"]
        assert await plain.encode_batch(ordinary) == await obeying.encode_batch(ordinary)


def added(content: str, number: int, **flags: bool) -> dict[str, object]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": content, **usual, **flags}


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "qwen3"])
async def test_without_control_tokens_added_words_are_tokens_all_the_same(
    tmp_path: Path, minilm_folder: Path, kind: str
) -> None:
    source = {"bert": minilm_folder, "qwen3": GOLDEN / "qwen3" / "reranker"}.get(kind) or tiny_xlm_roberta(tmp_path)
    definition = json.loads((source / "tokenizer.json").read_text("utf-8"))
    first = Tokenizer.from_str(json.dumps(definition)).get_vocab_size()
    words: dict[str, dict[str, bool]] = {
        "photosynthesizer": {},
        "gold std": {"normalized": False},
        "oxq": {"single_word": True},
        "µgq": {"lstrip": True},
    }
    definition["added_tokens"] += [added(word, first + i, **flags) for i, (word, flags) in enumerate(words.items())]
    definition["added_tokens"] += [added("<|secret|>", first + 4, special=True), added("<turn>", first + 5)]
    definition["added_tokens"].append(added("last word", first + 6))
    file = tmp_path / "added.json"
    file.write_text(json.dumps(definition), "utf-8")
    texts = ["photosynthesizer of an oxq, oxqen", "gold std  µgq PHOTOSYNTHESIZER", "the last word", "a query"]
    tricks = ["<|secret|>", "a<|secret|>b", "<turn> a", "</s> [SEP] <|im_end|>"]
    with WorkerThreads(1) as threads:
        obeying, plain = (
            TokenizerPool(read_file(file), first + 7, LIMIT, threads, control_tokens=allowed, prompt="<turn>\n")
            for allowed in (True, False)
        )
        expected = await obeying.encode_batch(texts)
        assert {number for ids in expected for number in ids} >= {first, first + 1, first + 2, first + 3, first + 6}
        assert await plain.encode_batch(texts) == expected
        control = {token["id"] for token in definition["added_tokens"] if token["special"]} | {first + 5}
        unknown = {plain.tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")}
        for ids in await plain.encode_batch(tricks):
            assert not set(ids) & (control - unknown)
        assert plain.decode([first, first + 4]).strip() == "photosynthesizer"
