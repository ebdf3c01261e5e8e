"""What is kept in memory of what is on disk: little of each, in the order of creation."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection
from typing import Any, Generic, Protocol, TypeVar

from vecmill.core.types import Viewer


class KnownThing(Protocol):
    """A tuple that begins with `created_at` and `id`, so that the order of tuples is that of creation."""

    @property
    def created_at(self) -> float: ...
    @property
    def id(self) -> str: ...
    @property
    def owner(self) -> str | None: ...
    def __lt__(self, other: Any, /) -> bool: ...


K = TypeVar("K", bound=KnownThing)


class ByCreation(Generic[K]):
    """Things by their ids, and in the order of their creation; those of each owner, too. For one thread at a time."""

    def __init__(self) -> None:
        self._by_id: dict[str, K] = {}
        self._all: list[K] = []
        self._of: defaultdict[str | None, list[K]] = defaultdict(list)
        self._sorted = True

    def __contains__(self, thing_id: str) -> bool:
        return thing_id in self._by_id

    def get(self, thing_id: str) -> K | None:
        """That of an id."""
        return self._by_id.get(thing_id)

    def add(self, thing: K) -> None:
        """Add one whose id is not there."""
        self._by_id[thing.id] = thing
        for things in (self._all, self._of[thing.owner]):
            self._sorted = self._sorted and not (things and thing < things[-1])
            things.append(thing)

    def remove(self, thing_id: str) -> K | None:
        """Remove that of an id, and return it; None where there is none."""
        if (thing := self._by_id.pop(thing_id, None)) is None:
            return None
        self._sort()
        own = self._of[thing.owner]
        for things in (self._all, own):
            del things[bisect_left(things, thing)]
        if not own:
            del self._of[thing.owner]
        return thing

    def others(self, thing_ids: Collection[str]) -> list[str]:
        """The ids that are not among these."""
        return list(self._by_id.keys() - thing_ids)

    def newest(self, viewer: Viewer) -> list[K]:
        """The viewer's, the newest first."""
        self._sort()
        things = self._all if viewer.everything else self._of.get(viewer.owner, [])
        return things[::-1]

    def _sort(self) -> None:
        """Fast where only the last ones are not in order, and nothing where all are: most are added as the newest."""
        if not self._sorted:
            for things in (self._all, *self._of.values()):
                things.sort()
            self._sorted = True
