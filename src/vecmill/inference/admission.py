"""How much may be in progress. A request is admitted whole, before any work is done for it, or waits, or is refused.

Bulk leaves an eighth of the room to searches. Whoever waits is admitted in turn: first the client that has least in
progress, so that nobody's requests keep the others out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import exp
from time import monotonic
from typing import TypeVar

from vecmill.core.errors import Overloaded
from vecmill.core.protocols import SharedUse
from vecmill.core.types import NO_LIMITS, Caller, KeyLimits, Lane
from vecmill.inference.shared_limits import SharedLimits

K = TypeVar("K", str, str | None)

LONGEST_RETRY_AFTER = 60.0  # seconds; SDKs give up when told to wait for minutes
SEARCH_SHARE = 8  # an eighth of the room is kept for searches
MOST_WAITING = 4096  # of each lane; their bodies have a limit of their own
PACE_SECONDS = 10.0  # window of the measured rate; only seconds with much in progress count
BUSY_SHARE = 8  # from an eighth of the room taken on, the device is busy; a rate below that says little
KNOWN_SECONDS = 1.0  # the expected rate counts as if it had been measured for so long
COUNTED_OF_ESTIMATED = 0.25  # tokens, before any were counted: estimates count characters


@dataclass(slots=True)
class Permit:
    """Room for one request, in tokens: reserved by estimate, and corrected by `settle` once they are counted.

    `settle` is called at most once.
    """

    tokens: int
    settle: Callable[[int], None]
    settled: bool = False


@dataclass(slots=True)
class Held:
    """What is in progress, of all or of one client."""

    requests: int = 0
    tokens: int = 0


@dataclass(eq=False, slots=True)
class _Waiter:
    caller: Caller
    lane: Lane
    tokens: int
    since: float
    room: asyncio.Future[None]
    admitted: bool = False


@dataclass(eq=False, slots=True)
class _Room:
    """What one lane has in progress, and who waits for more."""

    held: Held = field(default_factory=Held)
    clients: dict[str, Held] = field(default_factory=dict)
    waiting: dict[str, deque[_Waiter]] = field(default_factory=dict)
    """By client, each first come first served."""
    turns: dict[str, int] = field(default_factory=dict)
    """When each of these was admitted last, in the order of all admissions."""

    @property
    def waiters(self) -> int:
        return sum(map(len, self.waiting.values()))


class Admission:
    """Counts requests and tokens admitted and not yet answered. Belongs to the event loop's thread."""

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        *,
        wait_seconds: float = 0.0,
        most_waiting: int = MOST_WAITING,
        tokens_run: Callable[[], int] = lambda: 0,
        expected_rate: Callable[[], float] = lambda: 0.0,
        check_memory: Callable[[int], None] = lambda needed: None,
        limits_of: Callable[[str | None], KeyLimits] = lambda owner: NO_LIMITS,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`tokens_run` counts what the device has done since the start; `expected_rate`, in tokens a second, is what it
        can do, for as long as nothing is measured. `check_memory` raises where so many bytes more would be too many.
        """
        kept = min(max(1, max_requests // SEARCH_SHARE), max_requests - 1)
        self._bulk = Held(max_requests - kept, max_tokens - max_tokens // SEARCH_SHARE)
        self._searches = Held(max(1, kept), max_tokens // SEARCH_SHARE)
        self._all = Held(max_requests, max_tokens)
        self._wait_seconds, self._most_waiting = wait_seconds, most_waiting
        self._check_memory, self._limits_of, self._clock = check_memory, limits_of, clock
        self._pace = _Pace(tokens_run, expected_rate, clock)
        self._rooms = {lane: _Room() for lane in Lane}
        self._owners: dict[str | None, Held] = {}
        self._permits: dict[int, Permit] = {}
        self._admissions = 0
        self._shared: SharedLimits | None = None
        self.requests = 0
        self.tokens = 0

    def share(self, use: SharedUse) -> None:
        """Have the limits of keys hold over all servers that report to this store. Call once, in the event loop."""
        self._shared = SharedLimits(use)

    async def close(self) -> None:
        """End what `share` began."""
        if self._shared is not None:
            await self._shared.close()

    @property
    def _busy(self) -> bool:
        return self.requests * BUSY_SHARE >= self._all.requests or self.tokens * BUSY_SHARE >= self._all.tokens

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return sum(room.waiters for room in self._rooms.values())

    @asynccontextmanager
    async def admit(
        self, caller: Caller, lane: Lane, estimated_tokens: int, result_bytes: int = 0
    ) -> AsyncIterator[Permit]:
        """Hold room for a request as long as the context lasts. A lone request is admitted whatever its size.

        Raises:
            Overloaded: there was no room in time. MemoryLow: the machine has too little memory left.
        """
        self._check_memory(result_bytes)
        began, shared = self._clock(), await self._take_share(caller.owner, estimated_tokens)
        permit = Permit(estimated_tokens, settle=lambda counted: self._settle(caller, lane, permit, counted, shared))
        try:
            await self._admitted(caller, lane, estimated_tokens, self._wait_seconds - (self._clock() - began))
            self._permits[id(permit)] = permit
            try:
                yield permit
            finally:
                del self._permits[id(permit)]
                self._pace.done(permit.tokens if permit.settled else 0)
                self._hold(caller, lane, -1, -permit.tokens)
                self._admit_waiting()
        finally:
            if shared is not None:
                shared.change(caller.owner, -1, -permit.tokens)

    @asynccontextmanager
    async def counted_for_key(self, owner: str | None) -> AsyncIterator[None]:
        """Count a request that takes nothing of the room here, passed on to another server, among its key's.

        Raises:
            Overloaded: as many of this key's are in progress as may be.
        """
        if (refusal := self._key_limit(Caller(owner=owner), 0)) is not None:
            raise self._overloaded(refusal)
        shared = await self._take_share(owner, 0, wait=False)
        _count(self._owners, owner, 1, 0)
        try:
            yield
        finally:
            _count(self._owners, owner, -1, 0)
            if shared is not None:
                shared.change(owner, -1, 0)
            self._admit_waiting()

    async def _take_share(self, owner: str | None, tokens: int, *, wait: bool = True) -> SharedLimits | None:
        """Count a request among its key's at all servers; what it is to be given back to, None where nothing is shared.

        Raises:
            Overloaded: as many of this key's are in progress as may be.
        """
        limits = self._limits_of(owner)
        if self._shared is None or (limits.requests is None and limits.tokens is None):
            return None
        refusal = await self._shared.take(owner, tokens, limits, self._wait_seconds if wait else 0.0)
        if refusal is not None:
            raise self._overloaded(self._too_late(refusal) if wait and self._wait_seconds > 0 else refusal)
        return self._shared

    def _too_late(self, refusal: str) -> str:
        return f"timeout, there was no room within {self._wait_seconds:g} s (QUEUE_TIMEOUT): {refusal}"

    async def _admitted(self, caller: Caller, lane: Lane, tokens: int, wait_seconds: float) -> None:
        room = self._rooms[lane]
        refusal = self._refusal(caller, lane, tokens)
        if refusal is None and not room.waiting:
            self._hold(caller, lane, 1, tokens)
            return
        if wait_seconds <= 0 or not self._may_wait(room, caller.client):
            raise self._overloaded(refusal or "others wait already")
        waiter = _Waiter(caller, lane, tokens, self._clock(), asyncio.get_running_loop().create_future())
        room.waiting.setdefault(caller.client, deque()).append(waiter)
        self._admit_waiting()
        await self._wait(waiter, wait_seconds)

    async def _wait(self, waiter: _Waiter, wait_seconds: float) -> None:
        """Return once the waiter is admitted. A waiter that is cancelled frees its place."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await waiter.room
        except BaseException:
            self._leave(waiter)
            if waiter.admitted:
                self._hold(waiter.caller, waiter.lane, -1, -waiter.tokens)
            self._admit_waiting()
            raise
        if not waiter.admitted:
            refusal = self._refusal(waiter.caller, waiter.lane, waiter.tokens) or "others were before this request"
            error = self._overloaded(self._too_late(refusal))
            self._leave(waiter)
            self._admit_waiting()
            raise error

    def _leave(self, waiter: _Waiter) -> None:
        waiting = self._rooms[waiter.lane].waiting
        mine = waiting.get(waiter.caller.client)
        if mine is not None:
            with suppress(ValueError):
                mine.remove(waiter)
            if not mine:
                del waiting[waiter.caller.client]
                _forget_turn(self._rooms[waiter.lane], waiter.caller.client)

    def _may_wait(self, room: _Room, client: str) -> bool:
        """Whether one more may wait. If too many do, the newest of the client with most waiters is refused for it."""
        if room.waiters < self._most_waiting:
            return True
        largest = max(room.waiting.values(), key=len)
        if len(largest) <= len(room.waiting.get(client, ())) + 1:
            return False
        newest = largest[-1]
        self._leave(newest)
        newest.room.set_exception(self._overloaded(f"{room.waiters} requests wait for room"))
        return True

    def _admit_waiting(self) -> None:
        """Admit whoever there is room for. Those behind a large request do not overtake it: it would never be in."""
        for lane, room in self._rooms.items():
            while (first := self._first(room)) is not None and self._shortage(lane, first.tokens) is None:
                first.admitted = True
                self._leave(first)
                self._hold(first.caller, lane, 1, first.tokens)
                if not first.room.done():  # its time may be over just now
                    first.room.set_result(None)

    def _first(self, room: _Room) -> _Waiter | None:
        """The next waiter of the client with the least in progress, among those whose keys are below their limits."""
        heads = (waiters[0] for waiters in room.waiting.values())
        free = (waiter for waiter in heads if self._key_limit(waiter.caller, waiter.tokens) is None)
        return min(free, key=lambda waiter: self._turn(room, waiter), default=None)

    def _turn(self, room: _Room, waiter: _Waiter) -> tuple[float, int, float]:
        client = waiter.caller.client
        return self._share(room, client), room.turns.get(client, 0), waiter.since

    def _share(self, room: _Room, client: str) -> float:
        """A client's dominant share of the room (https://dl.acm.org/doi/10.5555/1972457.1972490)."""
        held = room.clients.get(client)
        if held is None:
            return 0.0
        return max(held.requests / self._all.requests, held.tokens / self._all.tokens)

    def _refusal(self, caller: Caller, lane: Lane, tokens: int) -> str | None:
        """Why a request cannot be admitted now; None: it can."""
        return self._key_limit(caller, tokens) or self._shortage(lane, tokens)

    def _shortage(self, lane: Lane, tokens: int) -> str | None:
        held = self._rooms[lane].held
        most = self._bulk if lane is Lane.BULK else self._searches
        by_requests, by_tokens = held.requests < most.requests, not held.tokens or held.tokens + tokens <= most.tokens
        everyone_by_requests = self.requests < self._all.requests
        everyone_by_tokens = self.tokens + tokens <= self._all.tokens
        if lane is Lane.BULK:  # both, but never nothing at all
            by_requests = by_requests and (everyone_by_requests or not held.requests)
            by_tokens = by_tokens and (everyone_by_tokens or not held.tokens)
        else:  # what is kept for searches, or what nobody has
            by_requests, by_tokens = by_requests or everyone_by_requests, by_tokens or everyone_by_tokens
        if not by_requests:
            return f"{self.requests} requests are in progress (MAX_CONCURRENT_REQUESTS)"
        return None if by_tokens else f"{self.tokens} tokens are in progress (MAX_QUEUED_TOKENS)"

    def _key_limit(self, caller: Caller, tokens: int) -> str | None:
        limits, held = self._limits_of(caller.owner), self._owners.get(caller.owner, Held())
        if limits.requests is not None and held.requests >= limits.requests:
            return f"{held.requests} requests of this API key are in progress, which is its limit (`requests`)"
        if limits.tokens is not None and held.tokens and held.tokens + tokens > limits.tokens:
            return f"{held.tokens} tokens of this API key are in progress, its limit is {limits.tokens} (`tokens`)"
        return None

    def _hold(self, caller: Caller, lane: Lane, requests: int, tokens: int) -> None:
        """Add to (or take from) what the lane, the client and the key have in progress."""
        self._pace.look(busy=self._busy)
        room = self._rooms[lane]
        self.requests += requests
        self.tokens += tokens
        room.held.requests += requests
        room.held.tokens += tokens
        _count(room.clients, caller.client, requests, tokens)
        if requests > 0:
            self._admissions += 1
            room.turns[caller.client] = self._admissions
        elif requests < 0:
            _forget_turn(room, caller.client)
        _count(self._owners, caller.owner, requests, tokens)

    def _settle(self, caller: Caller, lane: Lane, permit: Permit, counted: int, shared: SharedLimits | None) -> None:
        assert not permit.settled
        if shared is not None:
            shared.change(caller.owner, 0, counted - permit.tokens)
        self._pace.counted(permit.tokens, counted)
        self._hold(caller, lane, 0, counted - permit.tokens)
        permit.tokens, permit.settled = counted, True
        self._admit_waiting()

    def _overloaded(self, reason: str) -> Overloaded:
        error = Overloaded(f"The server is temporarily overloaded: {reason}; try again after Retry-After seconds.")
        self._pace.look(busy=self._busy)
        counted = sum(permit.tokens for permit in self._permits.values() if permit.settled)
        waiting = [waiter for room in self._rooms.values() for waiters in room.waiting.values() for waiter in waiters]
        estimated = self.tokens - counted + sum(waiter.tokens for waiter in waiting)
        error.retry_after = min(
            LONGEST_RETRY_AFTER, max(1.0, self._pace.seconds(counted, estimated, self.requests + len(waiting)))
        )
        return error


def _forget_turn(room: _Room, client: str) -> None:
    """Drop a client that has nothing in progress and nothing waiting: there is no limit to their number."""
    if client not in room.clients and client not in room.waiting:
        room.turns.pop(client, None)


def _count(table: dict[K, Held], name: K, requests: int, tokens: int) -> None:
    """Count for one client; drop it once it has nothing in progress: there is no limit to their number."""
    held = table.setdefault(name, Held())
    held.requests += requests
    held.tokens += tokens
    if not held.requests:
        del table[name]


class _Pace:
    """The rate at which admitted requests get done, measured while the server is busy."""

    def __init__(
        self, tokens_run: Callable[[], int], expected_rate: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._tokens_run, self._expected_rate, self._clock = tokens_run, expected_rate, clock
        self._looked_at = clock()
        self._run_before = 0
        self._seconds = self._run = self._answered = self._requests = 0.0
        self._ratio = COUNTED_OF_ESTIMATED

    def look(self, *, busy: bool) -> None:
        """Account for the time since the last call, in which the server was busy or not."""
        now, run = self._clock(), self._tokens_run()
        if busy:
            seconds = now - self._looked_at
            faded = exp(-seconds / PACE_SECONDS)
            self._seconds = self._seconds * faded + seconds
            self._run = self._run * faded + run - self._run_before
            self._answered *= faded
            self._requests *= faded
        self._looked_at, self._run_before = now, run

    def done(self, tokens: int) -> None:
        """A request is answered."""
        self._answered += tokens
        self._requests += 1

    def counted(self, estimated: int, counted: int) -> None:
        """The tokens that were estimated for a request, and those that were counted."""
        if estimated and counted:
            self._ratio += (counted / estimated - self._ratio) / 16

    def seconds(self, counted: int, estimated: int, requests: int) -> float:
        """Seconds until so many tokens, of so many requests, are done; 0 if nothing is known."""
        tokens = counted + estimated * self._ratio
        # What was answered lacks what long requests have done already, what was run lacks what need not be run.
        done, seconds, expected = max(self._run, self._answered), self._seconds, self._expected_rate()
        if done <= 0 and self._requests and seconds:
            return requests * seconds / self._requests
        if expected > 0:
            done, seconds = done + expected * KNOWN_SECONDS, seconds + KNOWN_SECONDS
        return tokens * seconds / done if done > 0 else 0.0
