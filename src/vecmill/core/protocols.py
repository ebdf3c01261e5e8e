"""What a room needs of the room below it, as narrow as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vecmill.core.types import Row, Vector


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One entry for each row, in order: its vector (a reranker's: one logit), or the error of that row alone."""

    rows: list[Vector | Exception]
    seconds: float
    """Time on the device."""


class Runner(Protocol):
    """Whatever runs one batch on the device."""

    async def run(self, model: str, rows: Sequence[Row]) -> BatchResult:
        """Run one forward pass. Raises when the whole batch failed; never leaves the caller waiting."""
        ...
