"""Texts per second and the other rates, defined once; and who uses the server.

A rate is what was answered in the last minute, divided by that minute. Where the server had nothing to do at first, the
time counts from when the first of these requests began, so that a rate is right from the first seconds of a job. The
time is the same for all rates of one moment: those of jobs and users sum up to that of the server. A text counts when
its request is answered with a result, whether its vector was computed or kept.

`/stats`, the dashboard and the views of jobs and batches all ask here; Prometheus counts the same texts at the same
moment (`vecmill_texts_total`).
"""

from __future__ import annotations

import operator
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from time import monotonic, time
from typing import Any, Generic, NamedTuple, TypeVar, cast

RATE_SECONDS = 60.0
USERS_SECONDS = 300.0
"""For how long after its last request somebody is shown as a user."""
SLOTS = 60
SAME_MOMENT = 0.05  # seconds
MOST_USERS = 256
MOST_JOBS = 1024
# How many of the oldest each addition looks at. With two, what is over is forgotten faster than new things come.
FORGOTTEN_AT_ONCE = 2

Clock = Callable[[], float]


class Work(NamedTuple):
    """What was answered."""

    texts: int = 0
    tokens: int = 0
    requests: int = 0
    searches: int = 0
    """Requests in the interactive lane: somebody waits for them."""
    cached_texts: int = 0
    cached_tokens: int = 0


class Passes(NamedTuple):
    """Forward passes that ended."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """On the device."""
    knee_tokens: int = 0
    """The sum of the knees of the models that they ran."""

    @property
    def tokens_per_pass(self) -> float | None:
        """The mean."""
        return self.tokens / self.passes if self.passes else None

    @property
    def fill_ratio(self) -> float | None:
        """Their tokens by their models' knees: below 1 more tokens would have taken about as long."""
        return self.tokens / self.knee_tokens if self.knee_tokens else None


class Count(NamedTuple):
    """A number of texts or lines."""

    number: int = 0


Counts = TypeVar("Counts", Work, Passes, Count)


def plus(some: Counts, more: Counts) -> Counts:
    """The sum of each field."""
    return _each(operator.add, some, more)


def minus(some: Counts, less: Counts) -> Counts:
    """The difference of each field."""
    return _each(operator.sub, some, less)


def _each(operation: Callable[[Any, Any], Any], some: Counts, other: Counts) -> Counts:
    make: Any = type(some)
    return cast(Counts, make(*map(operation, some, other)))


class RateWindow(Generic[Counts]):
    """Sums over the last `seconds`. Memory is bounded: what came within one of SLOTS parts of it is added up."""

    def __init__(self, nothing: Counts, seconds: float = RATE_SECONDS, clock: Clock = monotonic) -> None:
        self._nothing: Counts = nothing
        self._sums: Counts = nothing
        self._slot_seconds = seconds / SLOTS
        self._clock = clock
        self._slots: deque[tuple[int, Counts, float]] = deque()
        """Of each slot its number, its sums, and the earliest beginning of what ended in it."""

    def add(self, counts: Counts, took: float = 0.0) -> None:
        """Count something that happened now, and took so many seconds."""
        now = self._clock()
        slot, began = int(now // self._slot_seconds), now - took
        self._expire(slot)
        self._sums = plus(self._sums, counts)
        if self._slots and self._slots[-1][0] == slot:
            _, so_far, earlier = self._slots.pop()
            counts, began = plus(so_far, counts), min(began, earlier)
        self._slots.append((slot, counts, began))

    def span(self) -> float:
        """Seconds that the sums are of, at least a slot: since the first of it began, but no longer than the window."""
        now = self._clock()
        self._expire(int(now // self._slot_seconds))
        # The oldest slot has left the window as a whole, so that it covers a little less than its length.
        covered = (SLOTS - 1) * self._slot_seconds + now % self._slot_seconds
        began = min((began for _, _, began in self._slots), default=now)
        return max(min(covered, now - began), self._slot_seconds)

    def sums(self) -> Counts:
        """What happened within the window."""
        self._expire(int(self._clock() // self._slot_seconds))
        return self._sums

    def _expire(self, slot: int) -> None:
        while self._slots and self._slots[0][0] <= slot - SLOTS:
            self._sums = minus(self._sums, self._slots.popleft()[1])
        if not self._slots:
            self._sums = self._nothing  # without what floating point leaves of differences


class CountsById:
    """Counts of the last minute by id, for no more than `most` ids: the one used longest ago is forgotten first.

    Each new count also forgets old ones that are zero by now, so that memory follows what happened in a minute.
    """

    def __init__(self, most: int = MOST_JOBS, clock: Clock = monotonic) -> None:
        self._most, self._clock = most, clock
        self._windows: dict[str, RateWindow[Count]] = {}

    def add(self, identifier: str, number: int) -> None:
        """Count for one id."""
        window = self._windows.pop(identifier, None) or RateWindow(Count(), clock=self._clock)
        self._windows[identifier] = window
        window.add(Count(number))
        for oldest in list(islice(self._windows, FORGOTTEN_AT_ONCE)):
            if len(self._windows) > self._most or not self.count(oldest):
                del self._windows[oldest]

    def __len__(self) -> int:
        return len(self._windows)

    def count(self, identifier: str) -> int:
        """That of the last minute."""
        window = self._windows.get(identifier)
        return 0 if window is None else window.sums().number


@dataclass(frozen=True, slots=True)
class UserId:
    """Who asked. Client and job are what clients say."""

    owner: str | None = None
    """The key, as the records of its jobs name it; None: there are no keys."""
    client: str = ""
    job: str | None = None


@dataclass(slots=True)
class User:
    """What somebody has had answered lately."""

    id: UserId
    minute: RateWindow[Work]
    lately: RateWindow[Work]
    last_seen: float = 0.0
    """Unix time."""


class Rates:
    """What was answered in the last minute: in all, by user, by job. Belongs to the event loop's thread."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._all = RateWindow(Work(), clock=clock)
        self._span = (-SAME_MOMENT, 1.0)
        self._passes = RateWindow(Passes(), clock=clock)
        self.all_work, self.all_passes = Work(), Passes()
        """Since the start."""
        self._users: dict[UserId, User] = {}
        self._texts_of_jobs = CountsById(clock=clock)
        self._lines_of_batches = CountsById(clock=clock)

    def answered(self, work: Work, user: UserId, took: float = 0.0) -> None:
        """A request was answered with a result, after so many seconds."""
        self.all_work = plus(self.all_work, work)
        self._all.add(work, took)
        if user.job is not None:
            self._texts_of_jobs.add(user.job, work.texts)
        known = self._users.pop(user, None) or self._user(user)
        self._users[user] = known  # the last of those that would be forgotten
        known.minute.add(work)
        known.lately.add(work)
        known.last_seen = time()
        for oldest in list(islice(self._users, FORGOTTEN_AT_ONCE)):
            if not self._users[oldest].lately.sums().requests:
                del self._users[oldest]
        if len(self._users) > MOST_USERS:
            del self._users[self._superfluous()]

    def _superfluous(self) -> UserId:
        """Who is forgotten first: of the key that has most, and of its client that has most, the one longest ago.

        So whoever invents clients or jobs without end makes nobody forgotten but themselves.
        """
        [(owner, _)] = Counter(user.owner for user in self._users).most_common(1)
        of_owner = [user for user in self._users if user.owner == owner]
        [(client, _)] = Counter(user.client for user in of_owner).most_common(1)
        return next(user for user in of_owner if user.client == client)

    def _user(self, user: UserId) -> User:
        minute = RateWindow(Work(), clock=self._clock)
        return User(user, minute, RateWindow(Work(), USERS_SECONDS, self._clock))

    def forward_pass(self, tokens: int, seconds: float, knee_tokens: int) -> None:
        """A forward pass ended; `knee_tokens` of its model."""
        ended = Passes(1, tokens, seconds, knee_tokens)
        self._passes.add(ended)
        self.all_passes = plus(self.all_passes, ended)

    def lines_done(self, batch_id: str, lines: int) -> None:
        """Lines of a batch were answered, and are on disk."""
        self._lines_of_batches.add(batch_id, lines)

    @property
    def minute(self) -> Work:
        """What was answered in the last minute."""
        return self._all.sums()

    @property
    def passes(self) -> Passes:
        """The forward passes of the last minute."""
        return self._passes.sums()

    def per_second(self, count: float) -> float:
        """A count of the last minute as a rate. Whoever asks for several at once gets all of them over one time."""
        now = self._clock()
        if now - self._span[0] > SAME_MOMENT:
            self._span = now, self._all.span()
        return count / self._span[1]

    def span(self) -> float | None:
        """Seconds that the counts of the last minute are of; None where nothing was answered in it."""
        return self._all.span() if self.minute.requests else None

    def texts_of_job(self, job_id: str) -> int:
        """Texts that were answered in the name of a job or a batch in the last minute."""
        return self._texts_of_jobs.count(job_id)

    def lines_of_batch(self, batch_id: str) -> int:
        """Lines of a batch that were answered in the last minute."""
        return self._lines_of_batches.count(batch_id)

    def users(self) -> list[User]:
        """Who asked in the last USERS_SECONDS, whoever had the most tokens first."""
        users = [user for user in self._users.values() if user.lately.sums().requests]
        return sorted(users, key=lambda user: user.lately.sums().tokens, reverse=True)
