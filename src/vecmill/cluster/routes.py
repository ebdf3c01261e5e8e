"""What the front and the routers of one process share: where each request goes, and what is on its way.

Apart from `router`, which Ray sends to the front by value, with all its globals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol
from uuid import uuid4

from vecmill.core.routing import RoutedRequest
from vecmill.core.types import Lane, Task

ROUTE = "route"
"""The keyword argument of every call to a replica that is a `Route`."""


@dataclass(frozen=True, slots=True)
class Route:
    """What decides a request's way."""

    work: RoutedRequest
    task: Task = Task.EMBED
    replica: str | None = None
    """The only one that may have it: the rest of the request is there already, or the client names it."""
    home: bool = False
    """It is about state that one replica keeps: the key's first choice, however busy that is."""
    tried: frozenset[str] = frozenset()
    """Replicas that had the request and have not answered it: any other is better."""
    upload: str | None = None
    """The identifier of the request that this is a part of."""
    identifier: str = field(default_factory=lambda: uuid4().hex)


class Sent:
    """The tokens that this process has sent to each replica and that are not answered. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._all: dict[str, tuple[str | None, Lane, int]] = {}
        self._tokens: Counter[tuple[str | None, Lane]] = Counter()

    @contextmanager
    def counted(self, route: Route) -> Iterator[None]:
        """Count a request for as long as the context lasts, from when it has a replica."""
        work = route.work
        with self._lock:
            self._all[route.identifier] = (None, work.lane, work.tokens)
            self._tokens[None, work.lane] += work.tokens
        try:
            yield
        finally:
            with self._lock:
                name, lane, tokens = self._all.pop(route.identifier)
                self._tokens[name, lane] -= tokens
                if not self._tokens[name, lane]:
                    del self._tokens[name, lane]

    def went(self, route: Route, name: str) -> None:
        """The request has a replica, or another one than before. Nothing happens where it has ended."""
        with self._lock:
            if (known := self._all.get(route.identifier)) is not None:
                before, lane, tokens = known
                self._all[route.identifier] = (name, lane, tokens)
                self._tokens[before, lane] -= tokens
                self._tokens[name, lane] += tokens

    def replica_of(self, route: Route) -> str | None:
        """The replica that was chosen for a request; None as long as it waits for one."""
        known = self._all.get(route.identifier)
        return None if known is None else known[0]

    def tokens(self, name: str, lane: Lane) -> int:
        """What is with a replica now."""
        return self._tokens[name, lane]


class Routing(Protocol):
    """A router, as far as the front asks it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all replicas that take requests. May be asked from any thread."""
        ...


SENT: defaultdict[str, Sent] = defaultdict(Sent)
"""Of this process, by deployment."""
ROUTERS: dict[str, Routing] = {}
"""The same: what `Front` asks which replicas there are."""
