"""Who wants to hear of every change, and how far each has read.

A change is found once and put into JSON once, however many readers there are; they take turns to read it, so that the
event loop has turns of its own in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile

import orjson

from vecmill.core.errors import Overloaded
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import Job
from vecmill.jobs.views import ENDED_SHOWN, Views

AT_A_TIME = 64  # jobs that a reader is given at once
READERS_AT_ONCE = 8  # that read in one turn of the event loop
FOLLOWERS_MAX = 512
FRESH_SECONDS = 1.0  # how old the times in a job's JSON may be


@dataclass(slots=True)
class _Entry:
    """A job as it was last told of."""

    number: int
    """Of the change that made it what it is; grows."""
    job: Job
    state: tuple[int, int]
    data: bytes = b""
    written_at: float = 0.0

    def json(self, views: Views) -> bytes:
        """The job as the routes give it."""
        if not self.data or views.now - self.written_at >= FRESH_SECONDS:
            self.data, self.written_at = orjson.dumps(views.of(self.job)), views.now
        return self.data


class _Changes:
    """The last change of each job that there is, the newest last."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._views: Views | None = None
        self.latest = 0
        """The number of the newest change."""

    def look(self, views: Views) -> bool:
        """Find what has changed; False: nothing."""
        if self._views is not None and views.ledger is self._views.ledger:
            return False
        before, self._views = self.latest, views
        jobs = (*views.ledger.ended.values(), *views.ledger.open.values())
        for gone in self._entries.keys() - {job.id for job in jobs}:
            del self._entries[gone]
        for job in jobs:
            state = job.version, views.position(job)
            entry = self._entries.get(job.id)
            if entry is None or entry.state != state:
                self.latest += 1
                self._entries.pop(job.id, None)
                self._entries[job.id] = _Entry(self.latest, job, state)
        return self.latest != before

    def present(self, viewer: Viewer) -> list[str]:
        """The ids of the viewer's jobs that ended last, and of all his open ones."""
        ended, open_jobs = (
            [job_id for job_id, job in jobs.items() if self.shows(job, viewer)]
            for jobs in (self.views.ledger.ended, self.views.ledger.open)
        )
        return [*ended[-ENDED_SHOWN:], *open_jobs]

    def shows(self, job: Job, viewer: Viewer) -> bool:
        """Whether a job is among those that the viewer may see."""
        return self.views.ledger.shows(job, viewer)

    @property
    def views(self) -> Views:
        """The ledger that was last looked at."""
        assert self._views is not None  # every reader looks before it reads
        return self._views

    def refresh(self, views: Views) -> None:
        """What is put into JSON from now on shows the times of these views."""
        if views.now - self.views.now >= FRESH_SECONDS and views.ledger is self.views.ledger:
            self._views = views

    def of(self, job_id: str) -> _Entry | None:
        """The last change of a job."""
        return self._entries.get(job_id)

    def after(self, number: int) -> list[_Entry]:
        """What has changed since, the oldest first."""
        newer = takewhile(lambda entry: entry.number > number, reversed(self._entries.values()))
        return [*newer][::-1]


class _Follower:
    """One reader. Remembers how far it has read, not what it has missed: a slow one skips states."""

    def __init__(self, changes: _Changes, viewer: Viewer) -> None:
        self.wake = asyncio.Event()
        self._changes = changes
        self._viewer = viewer
        self._read = changes.latest
        self._present = iter(changes.present(viewer))
        """What there was when it began, as far as it has not been read yet."""

    def news(self) -> list[bytes]:
        """Some of the jobs that have changed, as they are now; empty if none has."""
        views = self._changes.views
        if found := [*islice(self._unread_of_the_present(), AT_A_TIME)]:
            return [entry.json(views) for entry in found]
        for entry in self._changes.after(self._read):
            if len(found) == AT_A_TIME:
                break
            self._read = entry.number
            if self._changes.shows(entry.job, self._viewer):
                found.append(entry)
        return [entry.json(views) for entry in found]

    def _unread_of_the_present(self) -> Iterator[_Entry]:
        """What has changed meanwhile comes as a change."""
        for job_id in self._present:
            entry = self._changes.of(job_id)
            if entry is not None and entry.number <= self._read:
                yield entry


class _Turns:
    """Lets a few go on in each turn of the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._running = False

    async def next(self) -> None:
        """Wait for a turn."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if not self._running:
            self._running = True
            loop.call_soon(self._let_go)
        await turn

    def _let_go(self) -> None:
        for _ in range(min(READERS_AT_ONCE, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
        self._running = bool(self._waiting)
        if self._running:
            asyncio.get_running_loop().call_soon(self._let_go)


class Followers:
    """All readers of the changes. Belongs to the event loop's thread."""

    def __init__(self, views: Callable[[], Views]) -> None:
        self._views = views
        self._changes = _Changes()
        self._turns = _Turns()
        self._all: set[_Follower] = set()
        self._over = False

    def follow(self, idle_seconds: float, viewer: Viewer = EVERYONE) -> AsyncGenerator[list[bytes], None]:
        """What is, then what changes, each job that the viewer may see as JSON; an empty list after `idle_seconds`
        without a change.

        Raises:
            Overloaded: there are too many readers.
        """
        if len(self._all) >= FOLLOWERS_MAX:
            raise Overloaded(f"The server is temporarily overloaded: {len(self._all)} clients follow the jobs.")
        return self._follow(idle_seconds, viewer)

    async def _follow(self, idle_seconds: float, viewer: Viewer) -> AsyncGenerator[list[bytes], None]:
        await self._turns.next()
        if self._look():
            self._wake_all()
        follower = _Follower(self._changes, viewer)
        self._all.add(follower)
        try:
            while not self._over:
                follower.wake.clear()
                await self._turns.next()
                if news := follower.news():
                    yield news
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(idle_seconds):
                        await follower.wake.wait()
                    continue
                yield []
        finally:
            self._all.discard(follower)

    def wake(self) -> None:
        """Something may have changed."""
        if self._all and self._look():
            self._wake_all()

    def end(self) -> None:
        """No more, for anybody."""
        self._over = True
        self._wake_all()

    def _look(self) -> bool:
        views = self._views()
        changed = self._changes.look(views)
        self._changes.refresh(views)
        return changed

    def _wake_all(self) -> None:
        for follower in self._all:
            follower.wake.set()
