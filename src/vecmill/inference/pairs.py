"""A query and its documents to rows for a reranker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vecmill.core.errors import InvalidInput, StartupError
from vecmill.core.types import Prefix, Row, TokenIds
from vecmill.inference.tokenization import Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.rerank_prompt import PREFIX, SUFFIX, middle


class PairTokenizer(Protocol):
    """One reranker's tokenizer."""

    async def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Tokenized]:
        """One row for each document, in order. Raises InvalidInput where the model takes no instruction."""
        ...


class CrossEncoderTokenizer:
    """`[CLS] query [SEP] document [SEP]`, as the tokenizer's own template for pairs has it."""

    def __init__(self, pool: TokenizerPool, max_model_len: int) -> None:
        self._pool = pool
        self._before, self._between, self._after, self._second_text = _template(pool)
        self._room = max_model_len - len(self._before) - len(self._between) - len(self._after)

    async def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Tokenized]:
        """See `PairTokenizer`."""
        if instruction:
            raise InvalidInput(
                "`instruction`: this reranker was trained without instructions; leave it out.", param="instruction"
            )
        first, *others = await self._pool.encode_batch([query, *documents])
        return [self._pair(first, other) for other in others]

    def _pair(self, first: list[int], second: list[int]) -> Tokenized:
        total = len(first) + len(second)
        keep_first, keep_second = longest_first(len(first), len(second), self._room)
        head = [*self._before, *first[:keep_first], *self._between]
        ids = np.array([*head, *second[:keep_second], *self._after], dtype=np.int32)
        row = Row(ids, second_text=len(head) if self._second_text else None)
        return Tokenized(row, len(ids) + total - keep_first - keep_second)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text are kept: the longer is cut first (the tokenizers library's rule)."""
    if first + second <= room:
        return first, second
    shorter, longer = min(first, second), max(first, second)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


def _template(pool: TokenizerPool) -> tuple[list[int], list[int], list[int], bool]:
    """Special tokens before, between and after two texts, and whether the second has a token type of its own."""
    tokenizer = pool.copy()
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    whole = tokenizer.encode("a", "b")
    ids = whole.ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(first)] == first)
    end = start + len(first)
    start_second = next(i for i in range(end, len(ids)) if ids[i : i + len(second)] == second)
    return ids[:start], ids[end:start_second], ids[start_second + len(second) :], whole.type_ids[start_second] == 1


class InstructTokenizer:
    """Qwen3-Reranker's prompt. What the documents' rows have in common becomes their prefix, computed once."""

    def __init__(
        self, pool: TokenizerPool, prompt: TokenizerPool, max_model_len: int, default_instruction: str
    ) -> None:
        """`pool` tokenizes what users send, `prompt` the words around it.

        Raises:
            StartupError: the tokenizer has no control tokens for a chat.
        """
        if prompt.special("<|im_start|>") is None or prompt.special("<|im_end|>") is None:
            raise StartupError("The reranker's tokenizer.json has no <|im_start|> and <|im_end|>: fetch it again.")
        self._pool = pool
        self._prefix, self._suffix = prompt.encode(PREFIX), prompt.encode(SUFFIX)
        self._room = max_model_len - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise StartupError(
                f"MAX_MODEL_LEN={max_model_len} leaves no room beside the reranker's prompt of "
                f"{len(self._prefix) + len(self._suffix)} tokens: raise it."
            )
        self._default_instruction = default_instruction

    async def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Tokenized]:
        """See `PairTokenizer`."""
        task = self._default_instruction if instruction is None else instruction
        encoded = await self._pool.encode_batch([middle(task, query, document) for document in documents])
        around = len(self._prefix) + len(self._suffix)
        rows = [np.array([*self._prefix, *ids[: self._room], *self._suffix], dtype=np.int32) for ids in encoded]
        totals = [len(ids) + around for ids in encoded]
        return [Tokenized(row, total) for row, total in zip(with_shared_prefix(rows), totals, strict=True)]


def with_shared_prefix(rows: Sequence[TokenIds]) -> list[Row]:
    """Rows whose leading tokens, as far as they are the same in all, are one prefix; each keeps a token of its own."""
    common = common_prefix(rows)
    if len(rows) < 2 or common == 0:
        return [Row(row) for row in rows]
    prefix = Prefix(rows[0][:common])
    return [Row(row[common:], prefix=prefix) for row in rows]


def common_prefix(rows: Sequence[TokenIds]) -> int:
    """How many leading tokens all rows share, one less than the shortest has at most."""
    longest = min(map(len, rows)) - 1
    same = np.ones(longest, dtype=bool)
    for row in rows[1:]:
        same &= row[:longest] == rows[0][:longest]
    return longest if same.all() else int(same.argmin())
