"""One tokenizer.json, read with the `tokenizers` library itself, and a copy of it for each thread.

transformers' wrappers rebuild some tokenizers with other ids. Truncation and padding that a file switches on
(MiniLM's does) are switched off: both are done here. Fast tokenizers are not safe to share between threads.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from vecmill.core.errors import StartupError
from vecmill.core.threads import WorkerThreads

T = TypeVar("T")

TEXTS_PER_TASK = 64
# A long text is tokenized only as far as needed: this many characters per token that fits, doubled until the
# limit is passed. Tokens near the end of a cut text may differ from those of the whole, so they do not count.
CHARACTERS_PER_TOKEN = 16
UNSURE_TOKENS = 128
# Rows of a token embedding without a token: vocabularies are padded to round numbers.
SPARE_ROWS, SPARE_SHARE = 512, 0.01


class TokenizerPool:
    """Texts to token ids, without special tokens around them, in a thread pool."""

    def __init__(
        self,
        file: Path,
        vocab_size: int,
        max_tokens: int,
        threads: WorkerThreads,
        *,
        control_tokens: bool = True,
    ) -> None:
        """Read the file. `max_tokens` is the most that is ever used of a text.

        Without `control_tokens`, what looks like one in a text is plain text.

        Raises:
            StartupError: it is not a tokenizer, or not that of a model with `vocab_size` rows.
        """
        definition = _read(file)
        _check_size(file, definition, vocab_size)
        # A token without a row in the model (Qwen3-Embedding-4B's `<think>`) is plain text to it.
        known = [token for token in definition.get("added_tokens", []) if token["id"] < vocab_size]
        definition["added_tokens"] = known
        self._special = {token["content"]: int(token["id"]) for token in known}
        self._secret = secrets.token_hex(16)
        self._hidden = frozenset[int]()
        if not control_tokens:
            self._hidden = frozenset(token["id"] for token in known if token.get("special"))
            _forget_control_tokens(definition, self._secret)
        self._definition = json.dumps(definition)
        self._max_tokens = max_tokens
        self._threads = threads
        self._local = threading.local()
        try:
            tokenizer = self.copy()
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{file} is not a tokenizer ({error}); fetch the model again.") from None

        if control_tokens and any(tokenizer.token_to_id(token) != number for token, number in self._special.items()):
            raise StartupError(
                f"{file}: a vocabulary with holes gives its added tokens other ids; fetch the model again."
            )

    def copy(self) -> Tokenizer:
        """This thread's copy."""
        tokenizer: Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            tokenizer = self._local.tokenizer = Tokenizer.from_str(self._definition)
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return tokenizer

    def special(self, token: str) -> int | None:
        """The id of an added token."""
        return self._special.get(token)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls each id."""
        tokenizer = self.copy()
        return [tokenizer.id_to_token(number) or "" for number in ids]

    def encode(self, text: str) -> list[int]:
        """All tokens of a short text, in this thread."""
        ids: list[int] = self.copy().encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, in this thread."""
        shown = [number for number in ids if not (skip_special_tokens and number in self._hidden)]
        text: str = self.copy().decode(shown, skip_special_tokens=skip_special_tokens)
        # Whoever knew it could write control tokens.
        return text.replace(self._secret, "")

    async def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, in order; of a long one at least the first `max_tokens`."""
        return await self.map(self.encode_part, texts)

    async def map(self, function: Callable[[Sequence[str]], list[T]], texts: Sequence[str]) -> list[T]:
        """Call the function on parts of the texts, in the threads; what it gives for each text, in order."""
        parts = [texts[i : i + TEXTS_PER_TASK] for i in range(0, len(texts), TEXTS_PER_TASK)]
        size = sum(map(len, texts))  # of the whole: a large request's parts must not fill the thread for small ones
        done = await asyncio.gather(*(self._threads.run(partial(function, part), size=size) for part in parts))
        return [one for part in done for one in part]

    def encode_part(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, in this thread."""
        tokenizer = self.copy()
        longest_sure = CHARACTERS_PER_TOKEN * self._max_tokens
        short = [text for text in texts if len(text) <= longest_sure]
        encoded = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [next(encoded).ids if len(text) <= longest_sure else self._encode_head(text) for text in texts]

    def encode_part_from_end(self, texts: Sequence[str], head: int = 0) -> list[list[int]]:
        """As `encode_part`, but of a long text the tokens of its first `head` characters or more, then those of its
        end: at least the last `max_tokens`.
        """
        longest_sure = CHARACTERS_PER_TOKEN * self._max_tokens
        return [self.encode(text) if len(text) <= longest_sure else self._encode_tail(text, head) for text in texts]

    def _encode_tail(self, text: str, head: int) -> list[int]:
        """The tokens of a long text's end, more than fit, after its head; all tokens where there are not so many."""
        length = CHARACTERS_PER_TOKEN * self._max_tokens
        while length < len(text):
            ids = self.encode(text[-length:])
            if len(ids) > self._max_tokens + UNSURE_TOKENS:
                # The head's last token may take in characters that follow it.
                beginning = self.encode(text[: head + UNSURE_TOKENS]) if head else []
                return [*beginning, *ids[UNSURE_TOKENS:]]
            length *= 2
        return self.encode(text)

    def _encode_head(self, text: str) -> list[int]:
        """The tokens of a long text's beginning, more than fit; all tokens where there are not so many."""
        length = CHARACTERS_PER_TOKEN * self._max_tokens
        while length < len(text):
            ids = self.encode(text[:length])
            if len(ids) > self._max_tokens + UNSURE_TOKENS:
                return ids[:-UNSURE_TOKENS]
            length *= 2
        return self.encode(text)


def _read(file: Path) -> dict[str, Any]:
    try:
        definition: dict[str, Any] = json.loads(file.read_text("utf-8"))
        definition["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(
            f"{file} is not a tokenizer ({type(error).__name__}: {error}); fetch the model again."
        ) from None
    return definition


def _check_size(file: Path, definition: dict[str, Any], vocab_size: int) -> None:
    """A tokenizer with more tokens than the model has rows, or with far fewer, belongs to another model."""
    ids = set(_vocabulary(definition).values())
    largest = max(ids, default=0)
    tokens = len(ids | {token["id"] for token in definition.get("added_tokens", [])})
    if largest >= vocab_size or vocab_size - tokens > max(SPARE_ROWS, SPARE_SHARE * vocab_size):
        raise StartupError(
            f"{file} has {tokens} tokens with ids up to {largest}, but the model embeds {vocab_size}: the tokenizer "
            f"belongs to another model."
        )


def _vocabulary(definition: dict[str, Any]) -> dict[str, int]:
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):  # BPE, WordPiece
        return vocabulary
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}  # Unigram


def _forget_control_tokens(definition: dict[str, Any], secret: str) -> None:
    """Take the added tokens out, and their pieces of the vocabulary out of reach of any text.

    Ids must stay where they are, so a piece is renamed, to what nobody can guess; the unknown token keeps its name.
    """
    model = definition["model"]
    added = {token["content"] for token in definition["added_tokens"]} - {model.get("unk_token")}
    definition["added_tokens"] = []
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {f"{secret}{piece}" if piece in added else piece: index for piece, index in vocabulary.items()}
        return
    unknown = model.get("unk_id")
    model["vocab"] = [
        [f"{secret}{piece}" if piece in added and index != unknown else piece, score]
        for index, (piece, score) in enumerate(vocabulary)
    ]
