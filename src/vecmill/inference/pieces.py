"""Texts as the pieces a model reads, and back: what /tokenize and /detokenize answer."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding

from vecmill.core.errors import InvalidInput
from vecmill.core.types import Piece
from vecmill.inference.prompts import with_prompt
from vecmill.inference.served import ServedEmbedder, ServedReranker
from vecmill.inference.token_ids import refuse_empty


def pieces(
    model: ServedEmbedder | ServedReranker, texts: Sequence[str], prompt: str, *, special_tokens: bool
) -> list[list[Piece]]:
    """The pieces of each text, uncut; with the special tokens that an embedding model's rows have around them."""
    pool = model.tokenizer.pool
    before, after = model.tokenizer.around if special_tokens and isinstance(model, ServedEmbedder) else ([], [])
    names = pool.tokens([*before, *after])
    special = [
        Piece(number, name, name, True, None, None) for number, name in zip([*before, *after], names, strict=True)
    ]
    found = []
    for text in texts:
        prompted = with_prompt(prompt, text)
        inner = _inner(pool.copy().encode(prompted, add_special_tokens=False), prompted)
        found.append([*special[: len(before)], *inner, *special[len(before) :]])
    return found


def _inner(encoding: Encoding, text: str) -> list[Piece]:
    """What stands in the text is never special, as TEI has it: an unknown word, a control token written out."""
    return [
        Piece(number, token, text[start:stop], False, start, stop)
        for number, token, (start, stop) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
    ]


def texts_of(
    model: ServedEmbedder | ServedReranker, inputs: Sequence[Sequence[int]], param: str, *, skip_special_tokens: bool
) -> list[str]:
    """The text of each list of token ids.

    Raises:
        InvalidInput: an id is outside the model's vocabulary, or a list is empty.
    """
    for index, ids in enumerate(inputs):
        refuse_empty(ids, f"{param}[{index}]")
        if not 0 <= min(ids) <= max(ids) < model.card.vocab_size:
            raise InvalidInput(
                f"`{param}[{index}]` has a token id outside 0..{model.card.vocab_size - 1}, the vocabulary of "
                f"{model.card.id}.",
                param=f"{param}[{index}]",
            )
    return [model.tokenizer.pool.decode(ids, skip_special_tokens=skip_special_tokens) for ids in inputs]
