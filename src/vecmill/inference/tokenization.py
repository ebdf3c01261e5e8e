"""Texts to rows for an embedding model: prompt before, special tokens around, cut to the model's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vecmill.core.errors import InvalidInput
from vecmill.core.types import Row
from vecmill.inference.prompts import with_prompt
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.text_format import TextFormat


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A ready row. `total` is its number of tokens before the cut, at least."""

    row: Row
    total: int

    @property
    def truncated(self) -> bool:
        return self.total > len(self.row)


class TextTokenizer:
    """One embedding model's tokenizer."""

    def __init__(self, pool: TokenizerPool, text_format: TextFormat, max_model_len: int, vocab_size: int) -> None:
        self._pool = pool
        self._format = text_format
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._prefix, self._suffix = self._special_tokens()

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What goes before and after a text."""
        tokenizer = self._pool.copy()
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a").ids
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        prefix, suffix = whole[:start], whole[start + len(plain) :]
        if self._format.end_token is not None:
            end = self._pool.special(self._format.end_token)
            if end is not None and suffix[-1:] != [end]:
                suffix.append(end)
        return prefix, suffix

    async def encode(self, texts: Sequence[str], prompt: str = "") -> list[Tokenized]:
        """Tokenize in the threads; the results are in order."""
        unpooled = 0
        if self._format.instruction_unpooled:
            # The reference counts the prompt's tokens by themselves and leaves out so many of the row, the first
            # special token included.
            [instruction] = await self._pool.encode_batch([prompt])
            unpooled = len(instruction)
        return await self._pool.map(partial(self._encode_part, prompt, unpooled), texts)

    def _encode_part(self, prompt: str, unpooled: int, texts: Sequence[str]) -> list[Tokenized]:
        encoded = self._pool.encode_part([with_prompt(prompt, text) for text in texts])
        return [self._finish(ids, unpooled) for ids in encoded]

    def _finish(self, ids: Sequence[int], unpooled: int = 0) -> Tokenized:
        """Put the special tokens around and cut on the right."""
        total = len(self._prefix) + len(ids) + len(self._suffix)
        if self._format.end_survives_truncation:
            ids = ids[: self._max_model_len - len(self._prefix) - len(self._suffix)]
        whole = [*self._prefix, *ids, *self._suffix][: self._max_model_len]
        return Tokenized(Row(np.array(whole, dtype=np.int32), unpooled=unpooled), total)

    def check(self, inputs: Sequence[Sequence[int]], param: str) -> list[Tokenized]:
        """Take token ids of this model's vocabulary as they are; special tokens are added where they are missing.

        Raises:
            InvalidInput: an id is outside the vocabulary, or a list is empty.
        """
        return [self._check_one(ids, f"{param}[{index}]") for index, ids in enumerate(inputs)]

    def _check_one(self, ids: Sequence[int], param: str) -> Tokenized:
        if not ids:
            raise InvalidInput(
                f"`{param}` is an empty list of token ids; send at least one id, or a text.", param=param
            )
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise InvalidInput(
                f"`{param}` has a token id outside 0..{self._vocab_size - 1}: ids must come from this model's own "
                f"tokenizer. Send text instead (with LangChain: check_embedding_ctx_length=False).",
                param=param,
            )
        bare = list(ids)
        if self._prefix and bare[: len(self._prefix)] == self._prefix:
            bare = bare[len(self._prefix) :]
        if self._suffix and bare[-len(self._suffix) :] == self._suffix:
            bare = bare[: -len(self._suffix)]
        return self._finish(bare)
