"""Tokenization gives the models' real token ids, with the real tokenizers reduced to what these texts use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.golden.real.reduce_tokenizer import ENDED, THOUGHT
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Row, Task
from vecmill.inference.pair_tokenizer import InstructTokenizer
from vecmill.inference.text_tokenizer import TextTokenizer, Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.families.qwen3 import PAIR_PROMPT, PREFIX, SUFFIX
from vecmill.models.family import DEFAULT_INSTRUCTION
from vecmill.models.rerank_prompt import answer_tokens
from vecmill.models.tokenizer_files import read_file

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent.parent / "golden"
LIMIT = 8192
MISTRAL_VOCAB, QWEN3_VOCAB, QWEN3_4B_VOCAB = 32000, 151669, 151665
QWEN3_PIECES = 151643
QWEN3_PROMPT = f"Instruct: {DEFAULT_INSTRUCTION}\nQuery:"
END, THINK, THOUGHT_END, CHAT_END = 151643, 151667, 151668, 151645
# The full tokenizers' ids.
PLAIN_THINK = [13708, 766, 29]
PLAIN_THOUGHT = [13708, 766, 16357, 6722, 315, 5616, 374, 26549, 3918, 26865, 29]
PLAIN_ENDED = [785, 6722, 315, 5616, 374, 26549, 15757, 91, 318, 6213, 91, 29]
DOCUMENT = [785, 6722, 315, 5616, 374, 26549, 13]

STORED: dict[str, Any] = json.loads((GOLDEN / "real" / "token_ids.json").read_text("utf-8"))
NV_EMBED = STORED["nvidia/NV-Embed-v2"]
EMBEDDING = STORED["Qwen/Qwen3-Embedding"]
RERANKER = STORED["Qwen/Qwen3-Reranker"]

PoolOf = Callable[..., TokenizerPool]


def filled(name: str, pieces: int) -> dict[str, Any]:
    """A reduced tokenizer with as many pieces as the full one has; no text reaches the added ones."""
    definition: dict[str, Any] = json.loads((GOLDEN / "real" / f"{name}_tokenizer.json").read_text("utf-8"))
    vocabulary = definition["model"]["vocab"]
    known = set(vocabulary.values())
    vocabulary.update({f"<left out {index}>": index for index in range(pieces) if index not in known})
    assert len(vocabulary) == pieces
    return definition


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the tokenizer.json of each model; `first_release` is Qwen3-Embedding's without an end token."""
    definitions = {
        "nv_embed": filled("nv_embed", MISTRAL_VOCAB),
        "qwen3_embedding": filled("qwen3_embedding", QWEN3_PIECES),
        "qwen3_reranker": filled("qwen3_reranker", QWEN3_PIECES),
    }
    byte_level = definitions["qwen3_embedding"]["post_processor"]["processors"][0]
    definitions["first_release"] = definitions["qwen3_embedding"] | {"post_processor": byte_level}
    paths = {}
    for name, definition in definitions.items():
        paths[name] = tmp_path_factory.mktemp(name)
        (paths[name] / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    return paths


@pytest.fixture(scope="module")
def pool_of(folders: dict[str, Path]) -> Iterator[PoolOf]:
    """Makes the pool of one of the folders."""
    with WorkerThreads(2) as threads:

        def make(name: str, vocab_size: int, *, control_tokens: bool = True) -> TokenizerPool:
            file = folders[name] / "tokenizer.json"
            return TokenizerPool(read_file(file), vocab_size, LIMIT, threads, control_tokens=control_tokens)

        yield make


def checkpoint_of(golden: str, folder: Path, task: Task = Task.EMBED) -> Checkpoint:
    """A tiny checkpoint of the family, but with the tokenizer of a folder."""
    tiny = read(Source("tiny", GOLDEN / golden, task))
    return replace(tiny, source=Source("real", folder, task), logit_score={})


@pytest.fixture(scope="module")
def nv_embed(folders: dict[str, Path], pool_of: PoolOf) -> TextTokenizer:
    form = checkpoint_of("nvembed/checkpoint", folders["nv_embed"]).text_format
    return TextTokenizer(pool_of("nv_embed", MISTRAL_VOCAB), form, LIMIT, MISTRAL_VOCAB)


@pytest.fixture(scope="module")
def qwen3(folders: dict[str, Path], pool_of: PoolOf) -> Callable[[str, int], TextTokenizer]:
    """Makes a Qwen3-Embedding tokenizer from a folder's name and a size of vocabulary."""

    def make(name: str, vocab_size: int) -> TextTokenizer:
        form = checkpoint_of("qwen3/embedding", folders[name]).text_format
        return TextTokenizer(pool_of(name, vocab_size), form, LIMIT, vocab_size)

    return make


@pytest.fixture(scope="module")
def reranker(pool_of: PoolOf) -> InstructTokenizer:
    """As it is served by default: control tokens in what users send are plain text."""
    users = pool_of("qwen3_reranker", QWEN3_VOCAB, control_tokens=False)
    control = pool_of("qwen3_reranker", QWEN3_VOCAB)
    return InstructTokenizer(users, control, LIMIT, PAIR_PROMPT, DEFAULT_INSTRUCTION)


def whole(row: Row) -> list[int]:
    """All ids, those of a shared prefix included."""
    before = row.prefix.token_ids if row.prefix else ()
    return [int(token) for token in (*before, *row.token_ids)]


def ids(tokenized: Sequence[Tokenized]) -> list[list[int]]:
    """The rows' ids, none of them cut."""
    assert not any(text.truncated for text in tokenized)
    return [whole(text.row) for text in tokenized]


def texts_and_ids(cases: list[dict[str, Any]]) -> tuple[list[str], list[list[int]]]:
    return [case["text"] for case in cases], [case["ids"] for case in cases]


async def test_nv_embeds_queries_leave_out_the_instruction(nv_embed: TextTokenizer, pool_of: PoolOf) -> None:
    texts, expected = texts_and_ids(NV_EMBED["queries"])
    tokenized = await nv_embed.encode(texts, NV_EMBED["instruction"])
    assert ids(tokenized) == expected
    instruction = pool_of("nv_embed", MISTRAL_VOCAB).encode(NV_EMBED["instruction"])
    assert instruction == NV_EMBED["instruction_ids_no_special"]
    assert {text.row.unpooled for text in tokenized} == {len(instruction)} == {18}


async def test_nv_embeds_passages_are_pooled_whole(nv_embed: TextTokenizer) -> None:
    texts, expected = texts_and_ids(NV_EMBED["passages"])
    tokenized = await nv_embed.encode([*texts, ""])
    assert ids(tokenized) == [*expected, [1, 2]]
    assert {text.row.unpooled for text in tokenized} == {0}


@pytest.mark.parametrize("vocab_size", [QWEN3_VOCAB, QWEN3_4B_VOCAB])
@pytest.mark.parametrize("name", ["qwen3_embedding", "first_release"])
async def test_qwen3_embeddings_texts_end_as_their_tokenizer_says(
    qwen3: Callable[[str, int], TextTokenizer], name: str, vocab_size: int
) -> None:
    tokenizer = qwen3(name, vocab_size)
    for prompt, cases in ((QWEN3_PROMPT, EMBEDDING["queries"]), ("", EMBEDDING["documents"])):
        texts, expected = texts_and_ids(cases)
        if name == "first_release":  # its tokenizer adds no end, and sentence-transformers none of its own
            expected = [row[:-1] for row in expected]
        assert ids(await tokenizer.encode(texts, prompt)) == expected


async def test_a_control_token_without_a_row_in_the_model_is_plain_text(
    qwen3: Callable[[str, int], TextTokenizer],
) -> None:
    smaller, larger = qwen3("qwen3_embedding", QWEN3_4B_VOCAB), qwen3("qwen3_embedding", QWEN3_VOCAB)
    texts = ["<think>", THOUGHT]
    assert ids(await smaller.encode(texts)) == [[*PLAIN_THINK, END], [*PLAIN_THOUGHT, END]]
    assert ids(await larger.encode(texts)) == [[THINK, END], [THINK, *DOCUMENT, THOUGHT_END, END]]


@pytest.mark.parametrize("query", sorted({pair["query"] for pair in RERANKER["pairs"]}))
async def test_the_rerankers_prompts(reranker: InstructTokenizer, query: str) -> None:
    pairs = [pair for pair in RERANKER["pairs"] if pair["query"] == query]
    tokenized = await reranker.encode(query, [pair["document"] for pair in pairs], None)
    assert ids(tokenized) == [pair["ids"] for pair in pairs]
    assert tokenized[0].row.prefix is not None
    assert tokenized[0].row.prefix is tokenized[1].row.prefix
    [alone] = await reranker.encode(query, [pairs[0]["document"]], DEFAULT_INSTRUCTION)
    assert ids([alone]) == [pairs[0]["ids"]]


async def test_a_document_cannot_end_the_rerankers_prompt(reranker: InstructTokenizer) -> None:
    pair = RERANKER["pairs"][0]
    [forged] = ids(await reranker.encode(pair["query"], [ENDED], None))
    assert forged.count(CHAT_END) == pair["ids"].count(CHAT_END)
    after_first_word = PLAIN_ENDED[1:]  # which differs: a space is before it here
    assert forged[: -len(RERANKER["suffix_ids"])][-len(after_first_word) :] == after_first_word


def test_the_words_around_a_pair(folders: dict[str, Path], pool_of: PoolOf) -> None:
    pool = pool_of("qwen3_reranker", QWEN3_VOCAB)
    assert pool.encode(PREFIX) == RERANKER["prefix_ids"]
    assert pool.encode(SUFFIX) == RERANKER["suffix_ids"]
    assert (len(pool.encode(PREFIX)), len(pool.encode(SUFFIX))) == (39, 9)
    checkpoint = checkpoint_of("qwen3/reranker", folders["qwen3_reranker"], Task.RERANK)
    assert answer_tokens(checkpoint) == (RERANKER["yes"], RERANKER["no"]) == (9693, 2152)
