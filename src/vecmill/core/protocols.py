"""What a room needs of the room below it, as narrow as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vecmill.core.types import Lane, Row, Vector


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One entry for each row, in order: its vector (a reranker's: one logit), or the error of that row alone."""

    rows: list[Vector | Exception]
    seconds: float
    """Time on the device."""
    splits: int = 0
    """How often the batch was halved because it did not fit into the device's memory."""
    fitting_tokens: int | None = None
    """Where it was: tokens of the largest part that did fit."""


class Runner(Protocol):
    """Whatever runs one batch on the device."""

    async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
        """Run one forward pass; interactive ones overtake bulk that has not begun.

        Raises when the whole batch failed; never leaves the caller waiting.
        """
        ...
