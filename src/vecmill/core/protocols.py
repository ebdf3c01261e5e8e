"""What a room needs of the room below it, where an import contract keeps it from naming the class itself.

`ForwardRunner`: the scheduler may not import the engine, which knows torch. `VectorStore`: SQLite's or Redis'.
`ReplicaStore`: importing Redis' needs an extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vecmill.core.types import KeyLimits, Lane, Row, Vector


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
    overlapped: bool = False
    """Whether a batch of the other lane ran on the device meanwhile, so that `seconds` is only its end."""


class ForwardRunner(Protocol):
    """What runs one batch on the device: the engine, which the scheduler may not import (it knows torch)."""

    async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
        """Run one forward pass; interactive ones overtake bulk that has not begun.

        Raises when the whole batch failed; never leaves the caller waiting.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredJobs:
    """What a store holds. A record is a job as bytes; the keeper knows nothing of their meaning."""

    open: Mapping[str, bytes] = field(default_factory=dict)
    """Records of the jobs that have not ended, by id, in no order."""
    ended: Sequence[bytes] = ()
    """Records of those that have, in the order of their numbers."""
    meta: bytes | None = None
    """What concerns all of them; None where nothing was ever written."""
    time: float = 0.0
    """Unix time by the store's own clock, where it has one."""
    turn: bytes | None = None
    """Of a server that the others let write first; None: everybody may."""


@dataclass(frozen=True, slots=True)
class JobChanges:
    """What to write, all of it or nothing."""

    open: Mapping[str, bytes]
    """Records that are new or have changed, by id."""
    closed: Sequence[str]
    """Ids that are open no more."""
    ended: Sequence[tuple[int, bytes]]
    """New records of ended jobs, by ever growing number."""
    forgotten: int
    """Ended jobs up to this number are deleted."""
    meta: bytes
    whole: bool = False
    """This is all there is: delete everything else first."""


@dataclass(frozen=True, slots=True)
class StoreSize:
    """How much a store holds."""

    entries: int
    bytes: int
    """On disk, or in Redis."""


class StoreFailed(Exception):
    """A store cannot be used now; nothing has changed. The message is for the log."""


class VectorStore(Protocol):
    """Bytes by key of 16 bytes. Every call blocks, may come from any thread, and may raise StoreFailed."""

    def get(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """Those of the keys that are there."""
        ...

    def put(self, entries: Mapping[bytes, bytes], used: Iterable[bytes]) -> int:
        """Add entries, note which others were used, and drop the least recently used while there is too much.

        How many were dropped.
        """
        ...

    def clear(self) -> int:
        """Drop everything; how many entries that were."""
        ...

    def size(self) -> StoreSize:
        """How much is there."""
        ...

    def close(self) -> None:
        """Close. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class StoredReplica:
    """What a server, or whoever else may write there, has left of itself."""

    record: bytes | None
    """None where it is too long, or no record at all."""
    age_seconds: float
    """Since it was written, by the store's own clock."""


REPLICA_BYTES = 8192
"""The longest record of a replica."""


class ReplicaStore(Protocol):
    """Where servers say of themselves that they are there. Every call but `close` may raise StoreFailed."""

    async def write(self, record: bytes, *, name: bytes, own: bytes) -> bool:
        """Put this server's record in the place of its last one; false where no place is free.

        Records of servers with the same name begin with `name`, records of this server alone with `own`.
        """
        ...

    async def read(self) -> Sequence[StoredReplica]:
        """Everybody's."""
        ...

    async def remove(self, *, own: bytes) -> None:
        """Remove this server's record."""
        ...

    async def close(self) -> None:
        """Close. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class UseSeen:
    """What a key has in progress at all servers together, after an exchange."""

    granted: bool
    """Whether what was asked for is counted."""
    requests: int
    tokens: int


class SharedUse(Protocol):
    """What each API key has in progress at servers that share their limits."""

    async def exchange(self, owner: str, requests: int, tokens: int, more: int | None, limits: KeyLimits) -> UseSeen:
        """Report what this server has in progress of a key; with `more`, ask for a request of so many tokens beside it.

        Raises:
            StoreFailed: the store does not answer; whether it has counted is not known.
        """
        ...

    async def close(self) -> None:
        """Close. Never raises."""
        ...
