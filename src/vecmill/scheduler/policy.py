"""The batch cut: pure, no clock, no event loop, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Cuttable(Protocol):
    """What the cut needs to know of a sequence."""

    def __len__(self) -> int:
        """Tokens, those of the prefix included."""
        ...

    @property
    def prefix(self) -> Sized | None:
        """Leading tokens that a batch computes once for all that have the same object here."""
        ...

    @property
    def abandoned(self) -> bool: ...


S = TypeVar("S", bound=Cuttable)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that one forward pass may hold."""

    max_batch_tokens: int
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Cut(Generic[S]):
    """The front of the queue, split: `batch` runs now, `abandoned` is dropped; both leave the queue."""

    batch: tuple[S, ...]
    abandoned: tuple[S, ...]
    tokens: int
    """What the batch has to compute, at the most: the runner may know a prefix from an earlier batch."""

    @property
    def taken(self) -> int:
        """How many sequences leave the front of the queue."""
        return len(self.batch) + len(self.abandoned)


def cut(waiting: Iterable[S], budget: Budget) -> Cut[S]:
    """Take sequences from the front, in order, while they fit.

    Abandoned ones are skipped and do not count. The first live one is always taken, so an input longer than the
    token budget runs alone and cannot block the queue. Cost is in the sequences taken, not in those waiting.
    """
    batch: list[S] = []
    abandoned: list[S] = []
    prefixes: set[int] = set()
    tokens = 0
    for sequence in waiting:
        if sequence.abandoned:
            abandoned.append(sequence)
            continue
        added = len(sequence)
        if sequence.prefix is not None and id(sequence.prefix) in prefixes:
            added -= len(sequence.prefix)
        if batch and (tokens + added > budget.max_batch_tokens or len(batch) == budget.max_batch_size):
            break
        tokens += added
        batch.append(sequence)
        prefixes.add(id(sequence.prefix))
    return Cut(tuple(batch), tuple(abandoned), tokens)
