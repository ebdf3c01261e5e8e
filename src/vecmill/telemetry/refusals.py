"""Requests that were answered with an error: whose fault it was, and the last of them, without what they said."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import merge
from itertools import islice
from operator import itemgetter
from time import time


class Blame(StrEnum):
    """Whose fault it is that a request was answered with an error."""

    CLIENT = "client"
    """It asked for what is not possible."""
    LOAD = "load"
    """There was no room or no time for it; the same request succeeds later."""
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was answered with an error. Its path is as the client sent it: not to be shown."""

    request_id: str
    status: int
    error: str
    """The class."""
    reason: str
    """A sentence, without anything that the client sent."""
    param: str | None
    """The field at fault, as the client wrote it: not to be shown before it is known to be one."""
    path: str
    client: str
    key: str | None
    owner: str | None
    at: float = field(default_factory=time)


REFUSALS_KEPT = 50
MOST_OWNERS = 64


class Refusals:
    """The last requests that were answered with an error, the newest first.

    As many of each key, so that one which is refused again and again does not push out what another would look for.
    """

    def __init__(self) -> None:
        self._by_owner: dict[str | None, deque[tuple[int, Refusal]]] = {}
        self._count = 0

    def add(self, refusal: Refusal) -> None:
        """One more."""
        mine = self._by_owner.pop(refusal.owner, None) or deque(maxlen=REFUSALS_KEPT)
        self._by_owner[refusal.owner] = mine  # the last of those that would be forgotten
        self._count += 1
        mine.appendleft((self._count, refusal))
        if len(self._by_owner) > MOST_OWNERS:
            del self._by_owner[next(iter(self._by_owner))]

    def of(self, owner: str | None) -> list[Refusal]:
        """The last of one key's."""
        return [refusal for _, refusal in self._by_owner.get(owner, ())]

    def __iter__(self) -> Iterator[Refusal]:
        """The last of all."""
        every = merge(*self._by_owner.values(), key=itemgetter(0), reverse=True)
        return (refusal for _, refusal in islice(every, REFUSALS_KEPT))
