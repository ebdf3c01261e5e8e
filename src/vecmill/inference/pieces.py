"""Texts as the pieces a model reads, and back: what /tokenize and /detokenize answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vecmill.core.errors import InvalidInput
from vecmill.core.types import DetokenizeRequest, ModelCard, Piece, TokenizeRequest
from vecmill.inference.prompts import missing_prompt
from vecmill.inference.token_ids import check_ids
from vecmill.inference.tokenizer_pool import TokenizerPool

# Bytes of texts, or token ids, of one request. Nothing may be cut here, and a token takes some hundred bytes until it
# is answered; of a text there may be one for each byte.
MOST_SHOWN = 250_000


def check_size(request: TokenizeRequest | DetokenizeRequest, prompt: str = "") -> int:
    """How large a request is, in characters with the prompt before each text, or in token ids.

    Raises:
        InvalidInput: too large to be shown.
    """
    if isinstance(request, TokenizeRequest):
        return _within(sum(len(text) + len(prompt) for text in request.texts), request.param, "characters")
    return _within(sum(map(len, request.inputs)), request.param, "token ids")


def _within(size: int, param: str, unit: str) -> int:
    if size > MOST_SHOWN:
        raise InvalidInput(
            f"`{param}` has {size} {unit}; {MOST_SHOWN} are possible in one request, split it.", param=param
        )
    return size


def pieces(
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
    _within(size, request.param, "bytes in the tokenizer's form")
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
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index] - len(self._before)
        if place < 0:
            return self._before[place]
        if place >= len(self._ids):
            return self._after[place - len(self._ids)]
        start, stop = self._offsets[place]
        return Piece(self._ids[place], self._tokens[place], self._text[start:stop], False, start, stop)


def texts_of(pool: TokenizerPool, card: ModelCard, request: DetokenizeRequest) -> list[str]:
    """The text of each list of token ids.

    Raises:
        InvalidInput: an id is outside the model's vocabulary, or a list is empty.
    """
    for index, ids in enumerate(request.inputs):
        param = f"{request.param}[{index}]"
        check_ids(ids, card.vocab_size, param, f"the vocabulary of {card.id}.")
    return [pool.decode(ids, skip_special_tokens=request.skip_special_tokens) for ids in request.inputs]
