"""A query and its documents to rows for a reranker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from vecmill.core.errors import InputTooLong, InvalidInput, StartupError
from vecmill.core.types import Prefix, Row, Side
from vecmill.inference.tokenization import Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.rerank_prompt import PREFIX, SUFFIX, answer, question


@dataclass(frozen=True, slots=True)
class PairLimits:
    """What a request wants cut from queries and documents, in tokens without special tokens."""

    side: Side | None = None
    """Of documents; a query is then cut at its end. None: of both what the tokenizer cuts."""
    query: int | None = None
    document: int | None = None
    pair: int | None = None
    """Of both together, all tokens around them included."""
    refuse: bool = False
    """What is longer than `pair` is an error."""
    query_side: Side = Side.RIGHT

    def cut_query(self, ids: list[int]) -> list[int]:
        """The query's tokens that stay."""
        return keep(ids, self.query, self.query_side)

    def cut_document(self, ids: list[int]) -> list[int]:
        """The document's tokens that stay."""
        return keep(ids, self.document, self.side)

    def room(self, max_model_len: int) -> int:
        """Tokens of a row."""
        return min(self.pair or max_model_len, max_model_len)


NO_LIMITS = PairLimits()


def keep(ids: list[int], limit: int | None, side: Side | None) -> list[int]:
    """So many tokens, the `side` cut off."""
    if limit is None or len(ids) <= limit:
        return ids
    return ids[len(ids) - limit :] if side is Side.LEFT else ids[:limit]


class PairTokenizer(Protocol):
    """One reranker's tokenizer."""

    pool: TokenizerPool

    async def encode(
        self, query: str, documents: Sequence[str], instruction: str | None, limits: PairLimits = NO_LIMITS
    ) -> list[Tokenized]:
        """One row for each document, in order.

        Raises:
            InvalidInput: the model takes no instruction, or the limits leave no room.
        """
        ...


class CrossEncoderTokenizer:
    """`[CLS] query [SEP] document [SEP]`, as the tokenizer's own template for pairs has it."""

    def __init__(self, pool: TokenizerPool, max_model_len: int) -> None:
        self.pool = pool
        self._max_model_len = max_model_len
        template = pool.around_pair
        self._before, self._between, self._after = template.before, template.between, template.after
        self._second_type = template.second_type
        self._around = len(template)

    async def encode(
        self, query: str, documents: Sequence[str], instruction: str | None, limits: PairLimits = NO_LIMITS
    ) -> list[Tokenized]:
        """See `PairTokenizer`."""
        if instruction:
            raise InvalidInput(
                "`instruction`: this reranker was trained without instructions; leave it out.", param="instruction"
            )
        if limits.room(self._max_model_len) < self._around + 2:
            raise InvalidInput(
                f"A limit of {limits.pair} tokens (`truncate_prompt_tokens`) leaves no room for a query and a document "
                f"beside the model's {self._around} special tokens; raise it to at least {self._around + 2}."
            )
        limits = replace(limits, side=limits.side or self.pool.truncation_side, query_side=self._query_side(limits))
        [whole] = await self.pool.map(partial(encode_documents, self.pool, side=limits.query_side), [query])
        first = limits.cut_query(whole)
        return await self.pool.map(partial(self._encode_part, first, len(first) < len(whole), limits), documents)

    def _query_side(self, limits: PairLimits) -> Side:
        return self.pool.truncation_side if limits.side is None else Side.RIGHT

    def _encode_part(
        self, first: list[int], shortened: bool, limits: PairLimits, documents: Sequence[str]
    ) -> list[Tokenized]:
        return [
            self._pair(first, second, limits, shortened)
            for second in encode_documents(self.pool, documents, limits.side)
        ]

    def _pair(self, first: list[int], document: list[int], limits: PairLimits, shortened: bool) -> Tokenized:
        second = limits.cut_document(document)
        total = len(first) + len(second) + self._around
        keep_first, keep_second = longest_first(
            len(first), len(second), limits.room(self._max_model_len) - self._around
        )
        head = [*self._before, *keep(first, keep_first, limits.query_side), *self._between]
        ids = np.array([*head, *keep(second, keep_second, limits.side), *self._after], dtype=np.int32)
        row = Row(ids, second_text=len(head) if self._second_type else None)
        shortened = shortened or len(second) < len(document)
        return tokenized(row, total, limits, self._max_model_len, shortened)


def encode_documents(pool: TokenizerPool, texts: Sequence[str], side: Side | None, before: str = "") -> list[list[int]]:
    """The tokens of each, with what goes before it; of a long one those at the end that stays."""
    encode = pool.encode_part_from_end if side is Side.LEFT else pool.encode_part
    return encode(texts, lambda text: before)


def tokenized(row: Row, total: int, limits: PairLimits, max_model_len: int, shortened: bool) -> Tokenized:
    """A limit of the request's own is no error where it may cut."""
    own = limits.pair is not None and limits.pair <= max_model_len and not limits.refuse
    if own and total > len(row):
        return Tokenized(row, len(row), shortened=True)
    return Tokenized(row, total, shortened)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text are kept: the longer is cut first (the tokenizers library's rule)."""
    if first + second <= room:
        return first, second
    shorter, longer = min(first, second), max(first, second)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


class InstructTokenizer:
    """Qwen3-Reranker's prompt. All before the documents is their rows' prefix, tokenized and computed once."""

    def __init__(
        self, pool: TokenizerPool, prompt: TokenizerPool, max_model_len: int, default_instruction: str
    ) -> None:
        """`pool` tokenizes what users send, `prompt` the words around it.

        Raises:
            StartupError: the tokenizer has no control tokens for a chat.
        """
        if prompt.special("<|im_start|>") is None or prompt.special("<|im_end|>") is None:
            raise StartupError("The reranker's tokenizer.json has no <|im_start|> and <|im_end|>: fetch it again.")
        self.pool = pool
        self._max_model_len = max_model_len
        self._before, self._after = prompt.encode(PREFIX), prompt.encode(SUFFIX)
        room = max_model_len - self._around
        if room < 1:
            raise StartupError(
                f"MAX_MODEL_LEN={max_model_len} leaves no room beside the reranker's prompt of "
                f"{self._around} tokens: raise it."
            )
        self._default_instruction = default_instruction

    @property
    def _around(self) -> int:
        return len(self._before) + len(self._after)

    async def encode(
        self, query: str, documents: Sequence[str], instruction: str | None, limits: PairLimits = NO_LIMITS
    ) -> list[Tokenized]:
        """See `PairTokenizer`.

        Raises:
            InputTooLong: instruction and query leave no room for a document.
            InvalidInput: within the request's own limit they leave none.
        """
        query, shortened = await self._cut_query(query, limits)
        asked = question(self._default_instruction if instruction is None else instruction, query)
        [head] = await self.pool.encode_batch([asked])
        most = limits.room(self._max_model_len) - self._around
        if most - len(head) < 1:
            self._check_own_limit(limits, len(head))
            raise InputTooLong(
                f"`query` and instruction have {len(head)} tokens, but the model's maximum context length leaves "
                f"{max(most, 0)} for them and a document; shorten the query.",
                param="query",
            )
        prefix = Prefix(np.array([*self._before, *head], dtype=np.int32))
        return await self.pool.map(partial(self._encode_part, prefix, limits, shortened), documents)

    def _check_own_limit(self, limits: PairLimits, head: int) -> None:
        """Refuse a limit of the request's own where the model's would leave room."""
        needed = self._around + head + 1
        if limits.pair is not None and needed <= self._max_model_len:
            raise InvalidInput(
                f"A limit of {limits.pair} tokens (`truncate_prompt_tokens`) leaves no room for a document beside the "
                f"{needed - 1} tokens of prompt, instruction and query; raise it to at least {needed}."
            )

    async def _cut_query(self, query: str, limits: PairLimits) -> tuple[str, bool]:
        """The query's beginning, as text: what follows it is tokenized together with it."""
        [ids] = await self.pool.encode_batch([query]) if limits.query is not None else [[]]
        if limits.query is None or len(ids) <= limits.query:
            return query, False
        kept = self.pool.decode(limits.cut_query(ids), skip_special_tokens=False)
        return kept.rstrip("\ufffd"), True  # the first bytes of a character

    def _encode_part(
        self, prefix: Prefix, limits: PairLimits, shortened: bool, documents: Sequence[str]
    ) -> list[Tokenized]:
        tails = encode_documents(self.pool, documents, limits.side, answer(""))
        return [self._row(prefix, tail, limits, shortened) for tail in tails]

    def _row(self, prefix: Prefix, whole: list[int], limits: PairLimits, shortened: bool) -> Tokenized:
        """The words after the document stay."""
        tail = limits.cut_document(whole)
        room = limits.room(self._max_model_len) - len(prefix) - len(self._after)
        row = Row(np.array([*keep(tail, room, limits.side), *self._after], dtype=np.int32), prefix=prefix)
        total = len(prefix) + len(tail) + len(self._after)
        return tokenized(row, total, limits, self._max_model_len, shortened or len(tail) < len(whole))
