"""What clients are told of the jobs: a job, the whole queue, or every change as it happens."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile

import orjson

from vecmill.config import JobSettings
from vecmill.core.errors import Overloaded
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import Job, JobStatus, View
from vecmill.jobs.state import Ledger

ENDED_SHOWN = 10


class Views:
    """A ledger as JSON, at one moment."""

    def __init__(
        self, ledger: Ledger, settings: JobSettings, now: float, rate_of: Callable[[str], float] = lambda job_id: 0.0
    ) -> None:
        """`rate_of` an open job: texts per second, see `telemetry.rates`."""
        self.ledger = ledger
        self._settings = settings
        self._rate_of = rate_of
        self.now = now
        self._places: dict[str, tuple[int, int]] = {}
        position = ahead = 0
        for job in ledger.open.values():
            if job.status is JobStatus.QUEUED:
                position += 1
                self._places[job.id] = (position, ahead)
            ahead += job.remaining

    def position(self, job: Job) -> int:
        """0 while active or ended, else its place among those that wait, from 1."""
        return self._places.get(job.id, (0, 0))[0]

    def find(self, job_id: str) -> View:
        """The view of the job with this id. Raises JobNotFound."""
        return self.of(self.ledger.find(job_id, EVERYONE))

    def of(self, job: Job) -> View:
        """The view of a job of this ledger."""
        position, ahead = self._places.get(job.id, (0, 0))
        shown = job.view(self.now) | {"position": position, "queue_position": position}
        if "chunks_per_second" in shown and not job.status.ended:
            rate = self._rate_of(job.id)
            shown["chunks_per_second"] = round(rate, 3)
            if rate > 0:  # what is left is by the rate that is shown beside it
                shown["eta_seconds"] = round(job.remaining / rate, 1)
        if job.status is JobStatus.QUEUED:
            shown |= {"chunks_ahead": ahead, "estimated_wait": self._wait(job, ahead)}
        return shown

    def overview(self, limit: int, state: JobStatus | None, project: str | None, viewer: Viewer = EVERYONE) -> View:
        """All of `GET /jobs`: the viewer's jobs, and how busy the queue is, whoever's jobs are in it."""
        rate = self.ledger.totals.pace.rate
        open_jobs, ended = self.ledger.open.values(), reversed(list(self.ledger.ended.values()))

        def of(jobs: Iterable[Job], *states: JobStatus) -> Iterable[View]:
            shown = states if state is None else {state}.intersection(states)
            mine = (job for job in jobs if self.ledger.shows(job, viewer))
            return (self.of(job) for job in mine if job.status in shown and project in (None, job.project))

        return {
            "active": list(of(open_jobs, JobStatus.ACTIVE)),
            "queued": list(of(open_jobs, JobStatus.QUEUED)),
            "recent": list(islice(of(ended, JobStatus.COMPLETED, JobStatus.FAILED), limit)),
            "workers": {
                "max": self._settings.jobs_max_active,
                "busy": sum(job.status is JobStatus.ACTIVE for job in open_jobs),
            },
            "historical_rate": None if rate is None else round(rate, 3),
        }

    def page(self, query: JobQuery, viewer: Viewer = EVERYONE) -> JobPage:
        """Some of the viewer's jobs: the active before those that wait, and those that ended last after them."""
        active = (job for job in self.ledger.open.values() if job.status is JobStatus.ACTIVE)
        queued = (job for job in self.ledger.open.values() if job.status is JobStatus.QUEUED)
        jobs = [*active, *queued, *reversed(list(self.ledger.ended.values()))]
        visible = [job for job in jobs if self.ledger.shows(job, viewer)]
        counts = Counter(job.status.value for job in visible)
        found = [job for job in visible if query.finds(job)]
        shown = found[query.first : query.first + query.size]
        return JobPage({status.value: counts[status.value] for status in JobStatus}, len(found), shown)

    def detailed(self, job: Job) -> View:
        """A job's view, with what whoever watches it wants to know; null where it does not apply, or is not known."""
        shown, ended = self.of(job), job.status.ended
        started_at = job.started_at or job.completed_at or self.now
        silent = self.now - (job.lease_until - self._settings.job_lease_seconds)
        rate = None if ended else self._rate_of(job.id)
        return {
            **dict.fromkeys(OF_STARTED),
            **(shown if rate else shown | {"eta_seconds": None}),
            "texts_per_second": None if rate is None else round(rate, 3),
            "silent_seconds": None if ended else round(max(0.0, silent), 1),
            "given_up_in_seconds": None if ended else round(max(0.0, job.lease_until - self.now), 1),
            "waiting_seconds": round(max(0.0, started_at - job.created_at), 1),
        }

    def _wait(self, job: Job, ahead: int) -> float | None:
        """Seconds; no more than until it is activated beside the others. None while no pace is known."""
        rate = self.ledger.totals.pace.rate
        if rate is None:
            return None
        left = job.created_at + self._settings.jobs_max_wait_seconds - self.now
        return round(max(0.0, min(ahead / rate, left)), 1)


OF_STARTED = ("started_at", "elapsed_seconds", "chunks_per_second", "eta_seconds", "percent", "completed_at", "error")


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Which jobs somebody wants to see."""

    text: str = ""
    """In their project, client or id, in whatever case."""
    status: JobStatus | None = None
    first: int = 0
    size: int = 25

    def finds(self, job: Job) -> bool:
        """Whether a job is one of them."""
        if self.status not in (None, job.status):
            return False
        text = self.text.casefold()
        return not text or any(text in field.casefold() for field in (job.project, job.instance_id, job.id))


@dataclass(frozen=True, slots=True)
class JobPage:
    """What a `JobQuery` found."""

    counts: dict[str, int]
    """Of all the viewer's jobs, by state."""
    total: int
    """Jobs that were found."""
    jobs: list[Job]


AT_A_TIME = 64  # jobs that a reader is given at once
READERS_AT_ONCE = 8  # that read in one turn of the event loop
FOLLOWERS_MAX = 512
FRESH_SECONDS = 1.0  # how old the times in a job's JSON may be


@dataclass(slots=True)
class _Entry:
    """The latest change of one job."""

    number: int
    """Of the change: each one gets the next."""
    job: Job
    state: tuple[int, int]
    data: bytes = b""
    written_at: float = 0.0

    def json(self, views: Views) -> bytes:
        """The job as the routes give it."""
        if not self.data or views.now - self.written_at >= FRESH_SECONDS:
            # Copied: what orjson returns takes 4 KB or more, however short, and it is kept for a thousand jobs.
            self.data, self.written_at = bytes(memoryview(orjson.dumps(views.of(self.job)))), views.now
        return self.data


class _Changes:
    """The latest change of each job, in order of change."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._views: Views | None = None
        self.latest = 0
        """The number of the newest change."""

    def look(self, views: Views) -> bool:
        """Compare with the ledger looked at before; whether anything has changed."""
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
        """The ids of the viewer's open jobs, after those of the last ENDED_SHOWN that ended."""
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
        """Serialise with the times of these views from now on."""
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
    """One reader. It keeps how far it has read, not a backlog: a slow reader skips intermediate states."""

    def __init__(self, changes: _Changes, viewer: Viewer) -> None:
        self.wake = asyncio.Event()
        self._changes = changes
        self._viewer = viewer
        self._read = changes.latest
        self._present = iter(changes.present(viewer))
        """Jobs that existed when it began and have not been read yet."""

    def news(self) -> list[bytes]:
        """Some of the jobs that have changed, as they are now; empty if none has."""
        views = self._changes.views
        if news := [*islice(self._unread_of_the_present(), AT_A_TIME)]:
            return [entry.json(views) for entry in news]
        for entry in self._changes.after(self._read):
            if len(news) == AT_A_TIME:
                break
            self._read = entry.number
            if self._changes.shows(entry.job, self._viewer):
                news.append(entry)
        return [entry.json(views) for entry in news]

    def _unread_of_the_present(self) -> Iterator[_Entry]:
        """Jobs that changed meanwhile are left out: they come as changes."""
        for job_id in self._present:
            entry = self._changes.of(job_id)
            if entry is not None and entry.number <= self._read:
                yield entry


class _ReaderTurns:
    """Lets READERS_AT_ONCE readers continue in each iteration of the event loop."""

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
    """Everybody who follows the jobs, and how far each has read. Belongs to the event loop's thread.

    A change is found once and serialised once, however many readers there are. Readers take turns, so that the event
    loop can do other work in between.
    """

    def __init__(self, views: Callable[[], Views]) -> None:
        self._views = views
        self._changes = _Changes()
        self._turns = _ReaderTurns()
        self._all: set[_Follower] = set()
        self._over = False

    def follow(self, idle_seconds: float, viewer: Viewer = EVERYONE) -> AsyncGenerator[list[bytes], None]:
        """The viewer's jobs as they are, then each whenever it changes, as JSON; an empty list after `idle_seconds`
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
        if len(self._all) >= FOLLOWERS_MAX:  # others came between the look at `follow` and this
            return
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
        """Tell the readers if anything has changed."""
        if self._all and self._look():
            self._wake_all()

    def end(self) -> None:
        """End every reader, and whoever begins to read."""
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
