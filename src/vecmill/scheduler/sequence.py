"""One tokenized input on its way to the device."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import perf_counter

from vecmill.core.types import Prefix, Row, Vector


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What a sequence's future resolves to."""

    vector: Vector
    queue_seconds: float
    """From submission to the start of its batch."""
    infer_seconds: float
    """The forward pass of its batch."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A row, the model that runs it, and the future that whoever submitted them waits on."""

    row: Row
    model: str
    future: asyncio.Future[SequenceResult]
    submitted: float = field(default_factory=perf_counter)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def prefix(self) -> Prefix | None:
        """Leading tokens that other sequences of its request share."""
        return self.row.prefix

    @property
    def abandoned(self) -> bool:
        """Nobody waits any more: the client left or another input of its request failed."""
        return self.future.done()
