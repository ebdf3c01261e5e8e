"""A query and its documents to rows for a reranker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from vecmill.core.errors import InputTooLong, InvalidInput, StartupError
from vecmill.core.types import Prefix, Row
from vecmill.inference.tokenization import Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.rerank_prompt import PREFIX, SUFFIX, answer, question


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
        [first] = await self._pool.encode_batch([query])
        return await self._pool.map(partial(self._encode_part, first), documents)

    def _encode_part(self, first: list[int], documents: Sequence[str]) -> list[Tokenized]:
        return [self._pair(first, second) for second in self._pool.encode_part(documents)]

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
        self._pool = pool
        self._before, self._after = prompt.encode(PREFIX), prompt.encode(SUFFIX)
        self._room = max_model_len - len(self._before) - len(self._after)
        if self._room < 1:
            raise StartupError(
                f"MAX_MODEL_LEN={max_model_len} leaves no room beside the reranker's prompt of "
                f"{len(self._before) + len(self._after)} tokens: raise it."
            )
        self._default_instruction = default_instruction

    async def encode(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Tokenized]:
        """See `PairTokenizer`.

        Raises:
            InputTooLong: instruction and query leave no room for a document.
        """
        asked = question(self._default_instruction if instruction is None else instruction, query)
        [head] = await self._pool.encode_batch([asked])
        room = self._room - len(head)
        if room < 1:
            raise InputTooLong(
                f"`query` and instruction have {len(head)} tokens, but the model's maximum context length leaves "
                f"{self._room} for them and a document; shorten the query.",
                param="query",
            )
        prefix = Prefix(np.array([*self._before, *head], dtype=np.int32))
        return await self._pool.map(partial(self._encode_part, prefix, room), documents)

    def _encode_part(self, prefix: Prefix, room: int, documents: Sequence[str]) -> list[Tokenized]:
        tails = self._pool.encode_part([answer(document) for document in documents])
        return [self._row(prefix, tail, room) for tail in tails]

    def _row(self, prefix: Prefix, tail: list[int], room: int) -> Tokenized:
        """The document is cut at its end; the words after it stay."""
        row = Row(np.array([*tail[:room], *self._after], dtype=np.int32), prefix=prefix)
        return Tokenized(row, len(prefix) + len(tail) + len(self._after))
