"""One tokenized input on its way to the device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from time import monotonic

from vecmill.core.errors import VecmillError
from vecmill.core.types import Lane, Prefix, Row, Vector


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
    """A row, the model that runs it, and the futures of all who wait for it: equal rows run once."""

    row: Row
    model: str
    key: Hashable
    """Equal for rows that give the same vector."""
    submitted: float = field(default_factory=monotonic)
    deadline: float = float("-inf")
    """Of whoever is ready to wait longest; by the monotonic clock."""
    futures: list[asyncio.Future[SequenceResult]] = field(default_factory=list)
    keep: Callable[[Vector], None] | None = None
    """Given the vector too, whoever still waits."""
    stands_in: set[tuple[Lane, str, str]] = field(default_factory=set)
    """Lane, client and job of each line that it waits in: one for each who asked for it."""
    taken: bool = False
    """In a batch, or dropped, though it may still stand in other lines."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def prefix(self) -> Prefix | None:
        """Leading tokens that other sequences of its request share."""
        return self.row.prefix

    def join(self, future: asyncio.Future[SequenceResult], deadline: float) -> None:
        """Wait for it too."""
        self.futures.append(future)
        self.deadline = max(self.deadline, deadline)

    def unwanted(self, now: float) -> bool:
        """Not to be run: it has been, nobody waits any more, or nobody waits that long."""
        return self.taken or now >= self.deadline or all(future.done() for future in self.futures)

    def resolve(self, result: SequenceResult | Exception) -> None:
        """Answer everyone who still waits."""
        if self.keep is not None and isinstance(result, SequenceResult):
            self.keep(result.vector)
        for future in self.futures:
            if future.done():
                continue
            if isinstance(result, VecmillError):
                future.set_exception(result.again())
            elif isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def row_key(model: str, row: Row) -> Hashable:
    """Equal for rows of one model that give the same vector."""
    prefix = row.prefix.token_ids.tobytes() if row.prefix is not None else b""
    return model, row.token_ids.tobytes(), prefix, row.unpooled, row.second_text
