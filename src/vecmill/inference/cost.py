"""What a request will take, before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vecmill.core.types import ModelCard

SPECIAL_TOKENS = 2  # of a text, for the estimate
PAIR_TOKENS = 128  # around a query and a document, for the estimate


def estimate(card: ModelCard, inputs: Iterable[str] | Iterable[Sequence[int]], around: int) -> int:
    """Tokens that the inputs will take, at most in practice: one a character or id, cut at the model's length.

    `around` is what goes around each of them, in characters.
    """
    return sum(min(len(one) + around + SPECIAL_TOKENS, card.max_model_len) for one in inputs)


def result_bytes(card: ModelCard, inputs: int) -> int:
    """Memory that a request's vectors take, at the most: as they come, and finished."""
    return inputs * (card.dimensions or 1) * (4 + 4)


def entries(param: str) -> Callable[[int], str]:
    """What a dialect calls each entry of its list, for error texts."""
    return lambda index: f"{param}[{index}]"
