"""Requests that were answered with an error: whose fault it was, and the last of them, without what they said."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
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


class Refusals:
    """The last requests that were answered with an error, the newest first."""

    def __init__(self) -> None:
        self._all: deque[Refusal] = deque(maxlen=REFUSALS_KEPT)

    def add(self, refusal: Refusal) -> None:
        """One more."""
        self._all.appendleft(refusal)

    def __iter__(self) -> Iterator[Refusal]:
        return iter(self._all)
