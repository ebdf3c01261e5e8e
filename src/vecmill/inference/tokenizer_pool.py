"""One tokenizer, run by the `tokenizers` library itself, in all threads.

Truncation and padding that a file switches on (MiniLM's does) are switched off: both are done here. A tokenizer is not
safe to share between threads that change it (transformers sets truncation and padding at each call); here nobody does
once it is made, and its methods take it by reference.

Of the library's methods only those that take a batch are called with what clients send: the others hold the interpreter
for as long as they run, and the event loop with it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeVar

from tokenizers import Encoding, Tokenizer

from vecmill.core.errors import StartupError
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Side
from vecmill.models.tokenizer_files import ReadTokenizer, Template, panics_refused

T = TypeVar("T")

TEXTS_PER_TASK = 64
# A long text is tokenized only as far as needed: this many characters per token that fits, then more until the limit is
# passed. Tokens near the end of a cut text may differ from those of the whole, so they do not count.
CHARACTERS_PER_TOKEN = 16
UNSURE_TOKENS = 128
# Characters tokenized in one call, but for a single text of more: the library takes 150 bytes for each, and over 1,800
# where a character is normalised to eighteen (U+FDFA). A text of other characters than ASCII's may be of such.
CHARACTERS_AT_ONCE = 16_384
FIRST_PER_TOKEN, FIRST_PER_TOKEN_ASCII = 2, 4
GROWTH = 3  # of what is tokenized of a long text, at most
# A stretch of text without any token's start or end is one unknown word, or nothing (spaces, characters that are
# dropped). From this length on, how long it is makes no difference; tokenizers' limits on words are near 100.
LONGEST_STRETCH = 2_048
STRETCH_CHARACTERS = 256  # different ones, at most, in a stretch that is skipped
SKIPPED_AT_ONCE = 1_048_576
# Rows of a token embedding without a token: vocabularies are padded to round numbers.
SPARE_ROWS, SPARE_SHARE = 512, 0.01


def _nothing(text: str) -> str:
    """What goes before a text without a prompt."""
    return ""


class TokenizerPool:
    """Texts to token ids, without special tokens around them, in a thread pool."""

    def __init__(
        self,
        read: ReadTokenizer,
        vocab_size: int,
        max_tokens: int,
        threads: WorkerThreads,
        *,
        control_tokens: bool = True,
        prompt: str = "",
    ) -> None:
        """Take a tokenizer. `max_tokens` is the most that is ever used of a text.

        Without `control_tokens`, what looks like one in a text is plain text: a special token, or one that `prompt` is
        written with. Added words that are neither are tokens all the same.

        Raises:
            StartupError: it is not a tokenizer, or not that of a model with `vocab_size` rows.
        """
        file = read.file
        definition = _definition(read)
        _check_size(file, definition, vocab_size)
        _check_template(read, vocab_size)
        # A token without a row in the model (Qwen3-Embedding-4B's `<think>`) is plain text to it.
        known = [token for token in definition.get("added_tokens", []) if token["id"] < vocab_size]
        definition["added_tokens"] = known
        self._special = {token["content"]: int(token["id"]) for token in known}
        self._secret = secrets.token_hex(16)
        self._hidden = frozenset[int]()
        if not control_tokens:
            control = [token for token in known if token.get("special") or _is_written(token["content"], prompt)]
            self._hidden = frozenset(token["id"] for token in control if token.get("special"))
            _hide(definition, {token["content"] for token in control}, self._secret)
        self._read = read
        self.max_tokens = max_tokens
        self._threads = threads
        try:
            with panics_refused(file):
                tokenizer = self.tokenizer = Tokenizer.from_str(json.dumps(definition))
                """Not to be changed: it is in use in several threads."""
                tokenizer.no_truncation()
                tokenizer.no_padding()
                tokenizer.encode_special_tokens = read.split_special_tokens
        except StartupError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{file} is not a tokenizer ({error}); fetch the model again.") from None

        added = ((token["content"], token["id"]) for token in definition["added_tokens"])
        if any(tokenizer.token_to_id(token) != number for token, number in added):
            raise StartupError(
                f"{file}: a vocabulary with holes gives its added tokens other ids; fetch the model again."
            )

    @property
    def truncation_side(self) -> Side:
        """Which end of a text that is too long is cut, unless the request chooses one."""
        return self._read.truncation_side

    @property
    def around(self) -> Template:
        """What the tokenizer puts around a text."""
        return self._read.around

    @property
    def around_pair(self) -> Template:
        """What it puts around and between two texts."""
        assert self._read.around_pair is not None  # that of every reranker of two texts has one
        return self._read.around_pair

    def special(self, token: str) -> int | None:
        """The id of an added token."""
        return self._special.get(token)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls each id."""
        return [self.tokenizer.id_to_token(number) or "" for number in ids]

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """All tokens of a short text, in this thread."""
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def with_offsets(self, text: str) -> Encoding:
        """The same, with the place of each token in the text."""
        [encoding] = self.tokenizer.encode_batch([text], add_special_tokens=False)
        return encoding

    def normalised_bytes(self, text: str) -> int:
        """How many bytes a text is normalised to, about: not fewer than it has tokens."""
        if text.isascii():  # no normaliser makes more of it
            return len(text)
        normalizer = self.tokenizer.normalizer
        parts = (text[i : i + CHARACTERS_AT_ONCE] for i in range(0, len(text), CHARACTERS_AT_ONCE))
        return sum(len((normalizer.normalize_str(part) if normalizer else part).encode()) for part in parts)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, in this thread."""
        shown = [number for number in ids if not (skip_special_tokens and number in self._hidden)]
        [text] = self.tokenizer.decode_batch([shown], skip_special_tokens=skip_special_tokens)
        # The secret must not reach a client: with it, a text could contain control tokens.
        return str(text).replace(self._secret, "")

    async def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, in order; of a long one at least the first `max_tokens`."""
        return await self.map(self.encode_part, texts)

    async def map(self, function: Callable[[Sequence[str]], list[T]], texts: Sequence[str]) -> list[T]:
        """Call the function on parts of the texts in worker threads; returns its results for all texts, in order."""
        parts = [texts[i : i + TEXTS_PER_TASK] for i in range(0, len(texts), TEXTS_PER_TASK)]
        size = sum(map(len, texts))  # of the whole: a large request's parts must not fill the thread for small ones
        done = await asyncio.gather(*(self._threads.run(partial(function, part), size=size) for part in parts))
        return [item for part in done for item in part]

    def encode_part(self, texts: Sequence[str], before: Callable[[str], str] = _nothing) -> list[list[int]]:
        """As `encode_batch`, in this thread. `before` says what goes before a text."""
        return self._encode(texts, before, lambda text: self._encode_long(text, before(text), from_end=False))

    def encode_part_from_end(
        self, texts: Sequence[str], before: Callable[[str], str] = _nothing, head: int = 0
    ) -> list[list[int]]:
        """As `encode_part`, but of a long text the tokens of its first `head` characters or more, then those of its
        end: at least the last `max_tokens`. What goes before a text counts as its beginning.
        """
        return self._encode(texts, before, lambda text: self._encode_long(text, before(text), head, from_end=True))

    def _encode(
        self, texts: Sequence[str], before: Callable[[str], str], encode_long: Callable[[str], list[int]]
    ) -> list[list[int]]:
        """Short texts together, as many as are tokenized at once; long ones by themselves."""
        short = (before(text) + text for text in texts if len(text) <= self._first_length(text))
        tokenize = partial(self.tokenizer.encode_batch_fast, add_special_tokens=False)
        encoded = chain.from_iterable(map(tokenize, _portions(short)))
        return [next(encoded).ids if len(text) <= self._first_length(text) else encode_long(text) for text in texts]

    def _first_length(self, text: str) -> int:
        """Characters to begin with; a text that is not longer is tokenized whole."""
        first = FIRST_PER_TOKEN_ASCII if text.isascii() else FIRST_PER_TOKEN
        return min(CHARACTERS_PER_TOKEN * self.max_tokens, max(CHARACTERS_AT_ONCE, first * self.max_tokens))

    def _encode_long(self, text: str, before: str, head: int = 0, *, from_end: bool) -> list[int]:
        """The tokens of a long text's beginning, more than fit, or of its end, after those of its head; all tokens
        where there are not so many.

        Stretches that are one token, or none, whatever their length, are shortened on the way: the memory is that of
        what fits, and the time that of reading the text once.
        """
        reader = _LongText(text, before, from_end=from_end)
        length, needed = self._first_length(text), self.max_tokens + UNSURE_TOKENS
        while True:
            reader.take(length)
            ids = self.encode(reader.part)
            if reader.whole:
                return ids
            if len(ids) > needed and not from_end:
                return ids[:-UNSURE_TOKENS]
            if len(ids) > needed:
                # The head's last token may take in characters that follow it.
                beginning = (before + text[: head + UNSURE_TOKENS])[: head + UNSURE_TOKENS] if head else ""
                return [*self.encode(beginning), *ids[UNSURE_TOKENS:]]
            if len(reader.part) > CHARACTERS_PER_TOKEN * len(ids):
                reader.shorten(self.with_offsets(reader.part).offsets)
            missing = len(reader.part) * (needed - len(ids)) // max(1, len(ids))
            length = max(CHARACTERS_AT_ONCE, min(missing + missing // 4, GROWTH * len(reader.part)))


class _LongText:
    """A text that is taken a piece at a time, from its beginning or its end, with what goes before it."""

    def __init__(self, text: str, before: str, *, from_end: bool) -> None:
        self._text = text
        self._before = before
        self._from_end = from_end
        self._taken = 0
        self.part = "" if from_end else before
        """What has been taken, stretches shortened."""

    @property
    def whole(self) -> bool:
        """Whether all of it has been taken."""
        return self._taken == len(self._text)

    def take(self, length: int) -> None:
        """Take so many characters more."""
        piece = self._next(length)
        self._taken += len(piece)
        self.part = piece + self.part if self._from_end else self.part + piece
        if self.whole and self._from_end:
            self.part = self._before + self.part

    def shorten(self, offsets: Sequence[tuple[int, int]]) -> None:
        """Take the middle out of each stretch that is within one token or between two; skip what continues the last.

        `offsets` are those of the tokens of `part`.
        """
        edges = sorted({0, len(self.part), *chain.from_iterable(offsets)})
        stretches = [self.part[start:stop] for start, stop in pairwise(edges)]
        last = stretches[0 if self._from_end else -1]
        if len(last) > LONGEST_STRETCH and len(characters := set(last)) <= STRETCH_CHARACTERS:
            self._skip("".join(characters))
        half = LONGEST_STRETCH // 2
        self.part = "".join(
            stretch if len(stretch) <= LONGEST_STRETCH else stretch[:half] + stretch[-half:] for stretch in stretches
        )

    def _skip(self, characters: str) -> None:
        """Pass over all that follows of these characters."""
        while piece := self._next(SKIPPED_AT_ONCE):
            rest = piece.rstrip(characters) if self._from_end else piece.lstrip(characters)
            self._taken += len(piece) - len(rest)
            if rest:
                return

    def _next(self, length: int) -> str:
        if self._from_end:
            stop = len(self._text) - self._taken
            return self._text[max(0, stop - length) : stop]
        return self._text[self._taken : self._taken + length]


def missing_prompt(prompt: str, text: str) -> str:
    """What still has to go before a text: clients that put the prompt there themselves do not get it twice."""
    return "" if text.startswith(prompt) else prompt


def _portions(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in lists of not more characters than are tokenized at once, or of a single text."""
    portion: list[str] = []
    size = 0
    for text in texts:
        if portion and size + len(text) > CHARACTERS_AT_ONCE:
            yield portion
            portion, size = [], 0
        portion.append(text)
        size += len(text)
    if portion:
        yield portion


def _definition(read: ReadTokenizer) -> dict[str, Any]:
    try:
        definition: dict[str, Any] = json.loads(read.definition)
        definition["model"]["vocab"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StartupError(
            f"{read.file} is not a tokenizer ({type(error).__name__}: {error}); fetch the model again."
        ) from None
    return definition


def _check_size(file: object, definition: dict[str, Any], vocab_size: int) -> None:
    """A tokenizer with more tokens than the model has rows, or with far fewer, belongs to another model."""
    ids = set(_vocabulary(definition).values())
    largest = max(ids, default=0)
    tokens = len(ids | {token["id"] for token in definition.get("added_tokens", [])})
    if largest >= vocab_size or vocab_size - tokens > max(SPARE_ROWS, SPARE_SHARE * vocab_size):
        raise StartupError(
            f"{file} has {tokens} tokens with ids up to {largest}, but the model embeds {vocab_size}: the tokenizer "
            f"belongs to another model."
        )


def _check_template(read: ReadTokenizer, vocab_size: int) -> None:
    """Every text would fail with a token around it that the model has no row for."""
    for around in filter(None, (read.around, read.around_pair)):
        if outside := [token for token in (*around.before, *around.between, *around.after) if token >= vocab_size]:
            raise StartupError(
                f"{read.file}: the tokenizer puts the token {outside[0]} around texts, but the model embeds "
                f"{vocab_size}: `tokenizer_class` or a special token in tokenizer_config.json is another model's; "
                f"fetch the model again."
            )


def _vocabulary(definition: dict[str, Any]) -> dict[str, int]:
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):  # BPE, WordPiece
        return vocabulary
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}  # Unigram


def _is_written(token: str, prompt: str) -> bool:
    """Whether a prompt is written with a token. White space is no control token: Gemma has line breaks as tokens."""
    return token in prompt and not token.isspace()


def _hide(definition: dict[str, Any], control: set[str], secret: str) -> None:
    """Put tokens out of reach of any text.

    Ids must stay where they are, so a token is renamed, to what nobody can guess. The unknown token keeps its name in
    the vocabulary, where the library looks for it.
    """
    model = definition["model"]
    vocabulary = _vocabulary(definition)
    # An added token has its id from the vocabulary where that has it, and else from its place in the list.
    definition["added_tokens"] = [
        {**token, "content": secret + token["content"]} if token["content"] in control else token
        for token in definition["added_tokens"]
        if token["content"] not in control or token["content"] not in vocabulary
    ]
    hidden = (control & vocabulary.keys()) - {model.get("unk_token")}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            f"{secret}{piece}" if piece in hidden else piece: index for piece, index in vocabulary.items()
        }
        return
    unknown = model.get("unk_id")
    model["vocab"] = [
        [secret + piece if piece in hidden and index != unknown else piece, score]
        for index, (piece, score) in enumerate(model["vocab"])
    ]
