"""What the front and the routers of one process share: where each request goes, and what is on its way.

Apart from `router`, which Ray sends to the front by value, with all its globals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic
from typing import Protocol
from uuid import uuid4

from vecmill.core.routing import LastAnswer, RoutedRequest
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


@dataclass(slots=True)
class _OnItsWay:
    """A request that is not answered."""

    lane: Lane
    tokens: int
    replica: str | None = None
    since: float = 0.0
    """When it went to this replica, monotonic."""


class Sent:
    """The tokens that this process has sent to each replica and that are not answered, and when it answered last.

    May be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._all: dict[str, _OnItsWay] = {}
        self._tokens: Counter[tuple[str | None, Lane]] = Counter()
        self._answers: dict[str, LastAnswer] = {}

    @contextmanager
    def counted(self, route: Route) -> Iterator[None]:
        """Count a request for as long as the context lasts, from when it has a replica."""
        work = route.work
        with self._lock:
            self._all[route.identifier] = _OnItsWay(work.lane, work.tokens)
            self._tokens[None, work.lane] += work.tokens
        try:
            yield
        finally:
            with self._lock:
                ended = self._all.pop(route.identifier)
                place = ended.replica, ended.lane
                self._tokens[place] -= ended.tokens
                if not self._tokens[place]:
                    del self._tokens[place]

    def went(self, route: Route, name: str) -> None:
        """The request has a replica, or another one than before. Nothing happens where it has ended."""
        with self._lock:
            if (sent := self._all.get(route.identifier)) is not None:
                self._tokens[sent.replica, sent.lane] -= sent.tokens
                self._tokens[name, sent.lane] += sent.tokens
                sent.replica, sent.since = name, monotonic()

    def answered(self, route: Route, took_seconds: float, rest_of_pass: float) -> None:
        """An answer begins, which took its replica so long, or nothing to speak of where all was cached."""
        with self._lock:
            sent = self._all.get(route.identifier)
            if sent is not None and sent.replica is not None:
                self._answers[sent.replica] = self.last_answer(sent.replica).followed_by(
                    sent.lane, sent.since, monotonic(), took_seconds, rest_of_pass
                )

    def last_answer(self, name: str) -> LastAnswer:
        """Of a replica; of none as yet, `LastAnswer()`."""
        return self._answers.get(name, LastAnswer())

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the answers of replicas that are gone."""
        with self._lock:
            self._answers = {name: answer for name, answer in self._answers.items() if name in names}

    def replica_of(self, route: Route) -> str | None:
        """The replica that was chosen for a request; None as long as it waits for one."""
        sent = self._all.get(route.identifier)
        return None if sent is None else sent.replica

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
