"""Text to token ids, in threads, cut to the model's length without losing its special tokens.

`tokenizer.json` is read with the `tokenizers` library itself: transformers' wrappers rebuild some tokenizers with
other ids. Truncation and padding that a file switches on (MiniLM's does) are switched off: both are done here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vecmill.core.errors import InvalidInput, StartupError
from vecmill.core.types import TokenIds

TEXTS_PER_TASK = 128
# A long text is tokenized only as far as needed: this many characters per token that fits, doubled until the
# limit is passed. Tokens near the end of a cut text may differ from those of the whole, so they do not count.
CHARACTERS_PER_TOKEN = 16
UNSURE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Ready token ids, special tokens included. `total` is their number before the cut, at least."""

    token_ids: TokenIds
    total: int

    @property
    def truncated(self) -> bool:
        return self.total > len(self.token_ids)


class TextTokenizer:
    """One model's tokenizer, with one copy for each thread: fast tokenizers are not safe to share."""

    def __init__(self, tokenizer_file: Path, max_model_len: int, vocab_size: int, pool: ThreadPoolExecutor) -> None:
        self._file = tokenizer_file
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._pool = pool
        self._local = threading.local()
        self._prefix, self._suffix = self._special_tokens()

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        tokenizer = self._tokenizer()
        if tokenizer.get_vocab_size() > self._vocab_size:
            raise StartupError(
                f"{self._file} has {tokenizer.get_vocab_size()} tokens, but the model embeds {self._vocab_size}: "
                f"the tokenizer belongs to another model."
            )
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a").ids
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:start], whole[start + len(plain) :]

    def _tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            tokenizer = self._local.tokenizer = Tokenizer.from_file(str(self._file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return tokenizer

    async def encode(self, texts: Sequence[str]) -> list[Tokenized]:
        """Tokenize in the thread pool; the results are in order."""
        loop = asyncio.get_running_loop()
        parts = [texts[i : i + TEXTS_PER_TASK] for i in range(0, len(texts), TEXTS_PER_TASK)]
        done = await asyncio.gather(*(loop.run_in_executor(self._pool, self._encode, part) for part in parts))
        return [tokenized for part in done for tokenized in part]

    def _encode(self, texts: Sequence[str]) -> list[Tokenized]:
        tokenizer = self._tokenizer()
        longest_sure = CHARACTERS_PER_TOKEN * self._max_model_len
        short = [text for text in texts if len(text) <= longest_sure]
        encoded = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            self._finish(next(encoded).ids if len(text) <= longest_sure else self._encode_head(tokenizer, text))
            for text in texts
        ]

    def _encode_head(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The tokens of a long text's beginning, more than fit; all tokens where there are not so many."""
        length = CHARACTERS_PER_TOKEN * self._max_model_len
        while length < len(text):
            ids: list[int] = tokenizer.encode(text[:length], add_special_tokens=False).ids
            if len(ids) > self._max_model_len + UNSURE_TOKENS:
                return ids[:-UNSURE_TOKENS]
            length *= 2
        whole: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return whole

    def _finish(self, ids: Sequence[int]) -> Tokenized:
        """Cut on the right and put the special tokens around."""
        room = self._max_model_len - len(self._prefix) - len(self._suffix)
        token_ids = np.array([*self._prefix, *ids[:room], *self._suffix], dtype=np.int32)
        return Tokenized(token_ids, len(ids) + len(self._prefix) + len(self._suffix))

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
