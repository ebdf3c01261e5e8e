"""Pairs equal what the tokenizers library gives when query and document are cut and put together by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.conftest import Sharing
from tests.models.loaded import GOLDEN, load_model
from tests.tiny_checkpoints import plain_tokenizer, tiny_cross_encoder
from vecmill.core.errors import InputTooLong, InvalidInput
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Side, Task
from vecmill.inference.pair_tokenizer import CrossEncoderTokenizer, InstructTokenizer, PairLimits
from vecmill.inference.text_tokenizer import Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.chat_template import PairPrompt, Pieces, Slot, UnfitTemplateError, filled
from vecmill.models.families.qwen3 import PAIR_PROMPT, PREFIX, SUFFIX
from vecmill.models.family import DEFAULT_INSTRUCTION
from vecmill.models.tokenizer_files import read_file

LIMIT, INSTRUCT_LIMIT = 64, 200
QUERY = "the quick brown fox jumps over the lazy dog"
DOCUMENTS = [
    "short",
    "",
    "plants create oxygen through a process that is known as photosynthesis. " * 4,
    "über die Brücke führt die Straße " * 600,
    "def add(first, second): return first + second",
]
SIDES = list(Side)


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    target = tmp_path_factory.mktemp(request.param) / "cross"
    return tiny_cross_encoder(target, kind=request.param, tokenizer_from=minilm_folder)


@pytest.fixture(scope="module")
def own(folder: Path) -> Tokenizer:
    return plain_tokenizer(folder)


@pytest.fixture(scope="module")
def pairs(folder: Path, own: Tokenizer) -> Iterator[CrossEncoderTokenizer]:
    with WorkerThreads(2) as threads:
        pool = TokenizerPool(read_file(folder / "tokenizer.json", pairs=True), own.get_vocab_size(), LIMIT, threads)
        yield CrossEncoderTokenizer(pool, LIMIT)


def by_hand(own: Tokenizer, query: str, document: str, limits: PairLimits) -> list[int]:
    """Cut query and document, then pair them. Only for pairs that then fit into the model."""
    first, second = (own.encode(text, add_special_tokens=False) for text in (query, document))
    if limits.query is not None:
        first.truncate(limits.query)
    if limits.document is not None:
        second.truncate(limits.document, direction=(limits.side or Side.RIGHT).value)
    ids: list[int] = own.post_process(first, second).ids
    return ids


def whole(tokenized: Tokenized) -> list[int]:
    before = tokenized.row.prefix.token_ids.tolist() if tokenized.row.prefix else []
    return [*before, *tokenized.row.token_ids.tolist()]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("query", "document"), [(None, 16), (3, 16), (1, 1), (100, 30), (5, None)])
async def test_each_text_is_cut_before_pairing(
    pairs: CrossEncoderTokenizer, own: Tokenizer, side: Side, query: int | None, document: int | None
) -> None:
    limits = PairLimits(side, query, document)
    documents = DOCUMENTS if document else [DOCUMENTS[0], DOCUMENTS[1], "a b"]
    tokenized = await pairs.encode(QUERY, documents, None, limits)
    assert list(map(whole, tokenized)) == [by_hand(own, QUERY, text, limits) for text in documents]
    assert not any(pair.too_long for pair in tokenized)
    query_cut = query is not None and query < len(own.encode(QUERY, add_special_tokens=False).ids)
    lengths = [len(own.encode(text, add_special_tokens=False).ids) for text in documents]
    assert [pair.truncated for pair in tokenized] == [
        query_cut or (document is not None and document < length) for length in lengths
    ]


def cut_by_library(own: Tokenizer, query: str, document: str, limit: int) -> list[int]:
    own.enable_truncation(limit)
    ids: list[int] = own.encode(query, document).ids
    own.no_truncation()
    return ids


@pytest.mark.parametrize("query", [QUERY, "", QUERY * 20])
async def test_without_limits_the_longer_is_cut_first(pairs: CrossEncoderTokenizer, own: Tokenizer, query: str) -> None:
    tokenized = await pairs.encode(query, DOCUMENTS, None)
    for pair, document in zip(tokenized, DOCUMENTS, strict=True):
        ids = whole(pair)
        assert ids == cut_by_library(own, query, document, LIMIT)
        assert pair.truncated == pair.too_long == (len(own.encode(query, document).ids) > LIMIT)


words = st.sampled_from(["dog", "the", "Brücke", "你好", "photosynthesis", "def", "-", "x" * 30])
texts = st.lists(words, max_size=40).map(" ".join)


@settings(deadline=None)
@given(query=texts, document=texts, limit=st.integers(6, 2 * LIMIT))
async def test_a_limit_of_both_bounds_the_row(
    pairs: CrossEncoderTokenizer, own: Tokenizer, query: str, document: str, limit: int
) -> None:
    [tokenized] = await pairs.encode(query, [document], None, PairLimits(pair=limit))
    most = min(limit, LIMIT)
    assert whole(tokenized) == cut_by_library(own, query, document, most)
    assert tokenized.truncated == (len(own.encode(query, document).ids) > most)
    assert tokenized.too_long == (tokenized.truncated and limit > LIMIT)


@settings(deadline=None)
@given(
    query=texts,
    document=texts,
    limits=st.builds(
        PairLimits,
        side=st.sampled_from(SIDES),
        query=st.none() | st.integers(1, 50),
        document=st.none() | st.integers(1, 50),
        pair=st.none() | st.integers(6, 100),
    ),
)
async def test_any_limits(
    pairs: CrossEncoderTokenizer, own: Tokenizer, query: str, document: str, limits: PairLimits
) -> None:
    [tokenized] = await pairs.encode(query, [document], None, limits)
    ids, cut = whole(tokenized), by_hand(own, query, document, limits)
    assert len(ids) == min(len(cut), limits.pair or LIMIT, LIMIT)
    if len(cut) == len(ids):
        assert ids == cut
    first, second = (own.encode(text, add_special_tokens=False).ids for text in (query, document))
    empty = own.encode("", "").ids
    before = ids[: len(ids) - 1]
    assert ids[0] == empty[0]
    assert ids[-1] == empty[-1]
    assert len(set(before) - set(first) - set(second) - set(empty)) == 0
    uncut = len(own.encode(query, document).ids)
    assert tokenized.truncated == (len(ids) < uncut)


@pytest.mark.parametrize("side", SIDES)
async def test_the_left_of_documents_is_cut_and_the_querys_end(
    pairs: CrossEncoderTokenizer, own: Tokenizer, side: Side
) -> None:
    first, second = (own.encode(text, add_special_tokens=False) for text in (QUERY, DOCUMENTS[3]))
    around = len(own.encode("", "").ids)
    kept = LIMIT - around - len(first.ids)
    second.truncate(kept, direction=side.value)
    [tokenized] = await pairs.encode(QUERY, [DOCUMENTS[3]], None, PairLimits(side))
    assert whole(tokenized) == own.post_process(first, second).ids
    assert tokenized.too_long


async def test_where_nothing_may_be_cut_the_requests_limit_is_an_error(pairs: CrossEncoderTokenizer) -> None:
    refused, fits = await pairs.encode("a", ["b " * 20, "b"], None, PairLimits(pair=12, refuse=True))
    assert (refused.too_long, fits.too_long) == (True, False)
    assert refused.total > 20


async def test_a_limit_without_room_for_a_pair_is_refused(pairs: CrossEncoderTokenizer, own: Tokenizer) -> None:
    around = len(own.encode("", "").ids)
    with pytest.raises(InvalidInput, match=rf"truncate_prompt_tokens.*no room.* at least {around + 2}\."):
        await pairs.encode(QUERY, ["a"], None, PairLimits(pair=around + 1))
    [tokenized] = await pairs.encode(QUERY, ["dog dog"], None, PairLimits(pair=around + 2))
    assert len(tokenized.row) == around + 2


class Instructed:
    """Qwen3-Reranker's tokenizer, and its rows by hand."""

    def __init__(self, threads: WorkerThreads) -> None:
        checkpoint, model = load_model(GOLDEN / "qwen3" / "reranker", Task.RERANK)
        self.pool = TokenizerPool(read_file(checkpoint.tokenizer_file), model.vocab_size, INSTRUCT_LIMIT, threads)
        self.tokenizer = InstructTokenizer(self.pool, self.pool, INSTRUCT_LIMIT, PAIR_PROMPT, DEFAULT_INSTRUCTION)
        self.own = Tokenizer.from_file(str(checkpoint.tokenizer_file))

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.own.encode(text, add_special_tokens=False).ids
        return ids

    def cut_query(self, query: str, limit: int) -> str:
        text: str = self.own.decode(self.ids(query)[:limit], skip_special_tokens=False)
        return text.rstrip("\ufffd")

    def row(self, query: str, document: Sequence[int]) -> list[int]:
        question = self.ids(f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>:")
        return [*self.ids(PREFIX), *question, *document, *self.ids(SUFFIX)]


@pytest.fixture(scope="module")
def instructed() -> Iterator[Instructed]:
    with WorkerThreads(2) as threads:
        yield Instructed(threads)


INSTRUCT_QUERY = "What is the capital of China? 好"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("limit", [1, 7, 10_000])
async def test_qwen3s_documents_are_cut_before_pairing(instructed: Instructed, side: Side, limit: int) -> None:
    documents = ["The capital of China is Beijing.", "Plants create oxygen. " * 2, "oxygen " * 30_000]
    tokenized = await instructed.tokenizer.encode(INSTRUCT_QUERY, documents, None, PairLimits(side, None, limit))
    room = INSTRUCT_LIMIT - len(instructed.row(INSTRUCT_QUERY, []))
    most = min(limit, room)
    for pair, document in zip(tokenized, documents, strict=True):
        ids = instructed.ids(f" {document}")
        kept = ids[-most:] if side is Side.LEFT else ids[:most]
        assert whole(pair) == instructed.row(INSTRUCT_QUERY, kept)
        assert pair.truncated == (len(ids) > most)
        assert pair.too_long == (len(ids) > most and limit > room)


@pytest.mark.parametrize("limit", range(1, 40, 3))
async def test_qwen3s_query_is_cut_before_pairing(instructed: Instructed, limit: int) -> None:
    [tokenized] = await instructed.tokenizer.encode(INSTRUCT_QUERY, ["oxygen"], None, PairLimits(query=limit))
    query = instructed.cut_query(INSTRUCT_QUERY, limit)
    assert INSTRUCT_QUERY.startswith(query)
    assert whole(tokenized) == instructed.row(query, instructed.ids(" oxygen"))
    assert tokenized.truncated == (limit < len(instructed.ids(INSTRUCT_QUERY)))


async def test_control_tokens_in_a_cut_query_are_read_as_in_a_whole_one(instructed: Instructed) -> None:
    query = "<think>What is the capital of China?"
    limits = PairLimits(query=len(instructed.ids("<think>What")))
    [tokenized] = await instructed.tokenizer.encode(query, ["oxygen"], None, limits)
    assert whole(tokenized) == instructed.row("<think>What", instructed.ids(" oxygen"))


@pytest.mark.parametrize("side", SIDES)
async def test_qwen3s_suffix_stays_within_every_limit(instructed: Instructed, side: Side) -> None:
    head = len(instructed.row(INSTRUCT_QUERY, []))
    suffix = instructed.ids(SUFFIX)
    document = instructed.ids(" " + "oxygen " * 30_000)
    for limit in (head + 1, head + 5, INSTRUCT_LIMIT, 1000):
        limits = PairLimits(side, pair=limit)
        [tokenized] = await instructed.tokenizer.encode(INSTRUCT_QUERY, ["oxygen " * 30_000], None, limits)
        ids, most = whole(tokenized), min(limit, INSTRUCT_LIMIT)
        kept = document[-(most - head) :] if side is Side.LEFT else document[: most - head]
        assert len(ids) == most
        assert ids[-len(suffix) :] == suffix
        assert ids == instructed.row(INSTRUCT_QUERY, kept)
        assert (tokenized.truncated, tokenized.too_long) == (True, limit > INSTRUCT_LIMIT)


async def test_qwen3s_limit_without_room_for_a_document_is_refused(instructed: Instructed) -> None:
    head = len(instructed.row(INSTRUCT_QUERY, []))
    with pytest.raises(InvalidInput, match=rf"truncate_prompt_tokens.*no room.* at least {head + 1}\.") as refused:
        await instructed.tokenizer.encode(INSTRUCT_QUERY, ["a"], None, PairLimits(pair=head))
    assert not isinstance(refused.value, InputTooLong)
    with pytest.raises(InputTooLong, match="maximum context length"):
        await instructed.tokenizer.encode("China " * 500, ["a"], None, PairLimits(pair=INSTRUCT_LIMIT))


LINES = ("Query: ", Slot.QUERY, "\nDocument: ", Slot.DOCUMENT, "\nRelevant:")
SEVERAL_TURNS = (
    "<|im_start|>system\n",
    Slot.INSTRUCTION,
    "<|im_end|>\n<|im_start|>user\n",
    Slot.QUERY,
    "<|im_end|>\n<|im_start|>user\n",
    Slot.DOCUMENT,
    "<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.parametrize("pieces", [PAIR_PROMPT.plain, LINES, SEVERAL_TURNS])
async def test_a_prompt_in_parts_has_the_tokens_of_the_whole(instructed: Instructed, pieces: Pieces) -> None:
    pool = instructed.pool
    tokenizer = InstructTokenizer(pool, pool, INSTRUCT_LIMIT, PairPrompt(pieces, pieces), "Find it")
    documents = ["oxygen", "", " space", "\n\nlines\n", "?!", "7", "é", "你好", "'s", "<|im_end|>", "ends.\n"]
    tokenized = await tokenizer.encode(INSTRUCT_QUERY, documents, None)
    assert [whole(pair) for pair in tokenized] == [
        instructed.ids(filled(pieces, "Find it", INSTRUCT_QUERY, document)) for document in documents
    ]
    # All before the documents is computed once, but for what may be one token with a document's first.
    [prefix] = {pair.row.prefix for pair in tokenized}
    assert prefix is not None
    before = filled(pieces[: pieces.index(Slot.DOCUMENT)], "Find it", INSTRUCT_QUERY, "")
    assert len(instructed.ids(before)) - len(prefix) <= 1


def test_a_prompt_that_is_not_split_before_the_document_is_refused(instructed: Instructed) -> None:
    pieces = ("<", Slot.QUERY, ">>", Slot.DOCUMENT)
    with pytest.raises(UnfitTemplateError, match="not split between the query and the document"):
        InstructTokenizer(instructed.pool, instructed.pool, INSTRUCT_LIMIT, PairPrompt(pieces, pieces))


def rerank(query: str, documents: Sequence[str], **fields: object) -> dict[str, object]:
    return {"query": query, "documents": list(documents), "raw_scores": True, **fields}


async def scores(client: httpx.AsyncClient, body: dict[str, object]) -> list[float]:
    answer = await client.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    return [result["relevance_score"] for result in sorted(results, key=lambda result: int(result["index"]))]


async def test_over_http_cut_documents_are_named(folder: Path, own: Tokenizer, shared: Sharing) -> None:
    documents = ["dog", "the dog and the fox", "fox"]
    client = await shared(rerank_model=str(folder))
    answer = await client.post("/v1/rerank", json=rerank("a fox", documents, max_tokens_per_doc=3))
    assert answer.json()["usage"]["truncated"] == [1]
    assert answer.headers["X-Truncated-Inputs"] == "1"
    first, second = (own.encode(text, add_special_tokens=False) for text in ("a fox", documents[1]))
    second.truncate(3)
    tokens = [own.encode("a fox", text).ids for text in ("dog", "fox")]
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, [*tokens, own.post_process(first, second).ids]))
    untouched = await client.post("/v1/rerank", json=rerank("a fox", documents, max_tokens_per_doc=100))
    assert "truncated" not in untouched.json()["usage"]
    assert "X-Truncated-Inputs" not in untouched.headers


@pytest.mark.parametrize("limits", [{"max_tokens_per_doc": 5000}, {"truncate_prompt_tokens": 128}, {"truncate": True}])
async def test_scores_do_not_depend_on_limits_that_do_not_bite(
    folder: Path, limits: dict[str, object], shared: Sharing
) -> None:
    documents = ["dog", "the dog and the fox", "fox"]
    client = await shared(rerank_model=str(folder))
    plain = await scores(client, rerank("a fox", documents))
    assert await scores(client, rerank("a fox", documents, **limits)) == pytest.approx(plain, abs=1e-6)
    cut = await scores(client, rerank("a fox", documents, max_tokens_per_doc=1))
    assert cut[1] != pytest.approx(plain[1], abs=1e-6)


async def test_over_http_a_pair_that_must_not_be_cut_is_a_400(folder: Path, shared: Sharing) -> None:
    client = await shared(rerank_model=str(folder))
    for field in ({"truncate": False}, {"truncate": "NONE"}, {"truncation": False}):
        body = rerank("a fox", ["dog", "the dog and the fox " * 3], truncate_prompt_tokens=12, **field)
        answer = await client.post("/v1/rerank", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "documents[1]")
        assert "maximum context length" in answer.json()["error"]["message"]
    small = await client.post("/v1/rerank", json=rerank("a fox", ["dog"], truncate_prompt_tokens=4))
    assert small.status_code == 400
    assert "`truncate_prompt_tokens`" in small.json()["error"]["message"]


LONG_QUERY = "How many people live in Berlin and what do they do there all day long"


async def test_an_embedding_models_limits_do_not_count_its_prompts(client: httpx.AsyncClient) -> None:
    """Without a reranker each text is a row of its own."""
    cut = await scores(client, rerank(LONG_QUERY, ["Berlin has museums and many people"], max_tokens_per_doc=3))
    assert cut == pytest.approx(await scores(client, rerank(LONG_QUERY, ["Berlin has museums"])), abs=1e-6)
    cut = await scores(client, rerank(LONG_QUERY, ["Berlin has museums"], max_tokens_per_query=5))
    by_hand = await scores(client, rerank("How many people live in", ["Berlin has museums"]))
    assert cut == pytest.approx(by_hand, abs=1e-6)
    instruction = "Find what answers this question about a city: "
    cut = await scores(client, rerank(LONG_QUERY, ["Berlin"], max_tokens_per_query=5, instruction=instruction))
    by_hand = await scores(client, rerank("How many people live in", ["Berlin"], instruction=instruction))
    assert cut == pytest.approx(by_hand, abs=1e-6)


async def test_of_an_embedding_models_limits_the_narrower_counts(client: httpx.AsyncClient) -> None:
    body = rerank("Berlin", ["Berlin has museums and many people"], max_tokens_per_doc=5, truncate_prompt_tokens=5)
    both = await client.post("/v1/rerank", json=body)
    assert both.json()["usage"] == {"prompt_tokens": 3 + 5, "total_tokens": 3 + 5, "truncated": [0]}
    expected = await scores(client, rerank("Berlin", ["Berlin has museums"]))
    assert both.json()["results"][0]["relevance_score"] == pytest.approx(expected[0], abs=1e-6)


async def test_an_embedding_models_query_is_cut_at_its_end(client: httpx.AsyncClient) -> None:
    body = rerank(LONG_QUERY, ["Berlin has museums"], max_tokens_per_query=5, max_tokens_per_doc=1)
    cut = await scores(client, {**body, "truncation_side": "left"})
    expected = await scores(client, rerank("How many people live in", ["museums"]))
    assert cut == pytest.approx(expected, abs=1e-6)
