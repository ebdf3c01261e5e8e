"""The queue of jobs as its callers see it: every call is one transaction on the stored jobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from vecmill.config import JobSettings
from vecmill.core.errors import JobsUnavailable, VecmillError
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import JobEvent, JobStatus, View
from vecmill.jobs.state import OPEN_JOBS_MAX, Book, Ledger, TransactionResult
from vecmill.jobs.views import ENDED_SHOWN, Followers, JobPage, JobQuery, Views
from vecmill.telemetry.rates import Count, CountsById, Rates, RateWindow

T = TypeVar("T")

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
# A lease is renewed by tagged requests at most once in this many seconds: there may be many in a second.
TOUCH_SECONDS = 5.0


class JobStore(Protocol):
    """The jobs, kept somewhere."""

    ledger: Ledger
    """As this server last saw it."""

    @property
    def problem(self) -> str | None:
        """Why the jobs cannot be stored now, as a sentence; None if they can."""
        ...

    async def open(self) -> None:
        """Read what is stored. Never raises: what cannot be read now is read later."""
        ...

    def now(self) -> float:
        """Unix time by the clock of leases."""
        ...

    async def transact(self, change: Callable[[Book], T]) -> TransactionResult[T]:
        """Change the jobs; kept when it returns. One at a time. `change` may be called several times.

        Raises:
            JobsUnavailable: nothing is known to be changed.
        """
        ...

    async def close(self) -> None:
        """Close. Never raises."""
        ...


class Reports:
    """What the jobs' clients reported to have done in the last minute, to whichever server."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: the jobs'."""
        self._clock = clock
        self._since = clock()
        self._looked_at = self._since
        self._current: dict[str, int] = {}
        self._all = RateWindow(Count(), clock=clock)
        self._by_job = CountsById(OPEN_JOBS_MAX, clock)

    def look(self, ledger: Ledger) -> None:
        """Count what the open jobs have done since the last look."""
        before, self._current = self._current, {job.id: job.current for job in ledger.open.values()}
        looked_at, self._looked_at = self._looked_at, self._clock()
        for job in ledger.open.values():
            # Of a job that is seen for the first time nobody knows when it did what, unless it is a new one.
            unseen = 0 if job.created_at >= self._since else job.current
            done = job.current - before.get(job.id, unseen)
            if done > 0:
                self._by_job.add(job.id, done)
                self._all.add(Count(done), took=self._looked_at - looked_at)

    def per_second(self, job_id: str, span: float | None) -> float:
        """Chunks per second of a job; `span`: of the rates of what was answered here, None where nothing was."""
        return self._by_job.count(job_id) / (span or self._all.span())


class JobQueue:
    """First come first served, a few active at a time, the abandoned given up.

    Belongs to the event loop's thread. Until `open`, and while a shared store does not answer, calls raise
    JobsUnavailable.
    """

    def __init__(self, settings: JobSettings, rates: Rates | None = None) -> None:
        """`rates`: of the texts that are answered in the jobs' names."""
        self._settings = settings
        self._rates = rates or Rates()
        self._reports: Reports | None = None
        self._store: JobStore | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._touching: set[str] = set()
        self._followers = Followers(self._views)

    async def open(self, store: JobStore) -> None:
        """Continue with the jobs that the store holds. Never raises."""
        await store.open()
        self._store = store
        self._reports = Reports(store.now)

    @property
    def problem(self) -> str | None:
        """Why the jobs cannot be stored or used now; None if they can."""
        return "The jobs are not open yet." if self._store is None else self._store.problem

    def start(self) -> None:
        """Sweep every second until `close`."""
        self._keep(asyncio.create_task(self._sweep_for_ever(), name="jobs"))

    async def close(self) -> None:
        """Finish the transactions under way, then close the store."""
        self.end_following()
        for task in self._tasks:
            if task.get_name() == "jobs":
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._store is not None:
            await self._store.close()
            self._store = None

    async def register(self, project: str, total_chunks: int, instance_id: str, viewer: Viewer = EVERYONE) -> View:
        """Register a job of the viewer. Position 0: active; 1: the first that waits.

        Raises:
            Overloaded: too many jobs are open. JobsUnavailable.
        """
        job_id, views = await self._transact(lambda book: book.register(project, total_chunks, instance_id, viewer))
        return views.find(job_id)

    async def get(self, job_id: str, viewer: Viewer = EVERYONE) -> View:
        """The job; asking renews its lease. Raises JobNotFound, JobsUnavailable.

        Here and below a job that is not the viewer's is none.
        """
        return await self._change(job_id, lambda book: book.renew(job_id, viewer))

    async def progress(self, job_id: str, current: int, viewer: Viewer = EVERYONE) -> View:
        """Record how many chunks are done.

        Raises:
            InvalidInput: below zero or above the job's total. JobNotFound, JobConflict, JobsUnavailable.
        """
        return await self._change(job_id, lambda book: book.progress(job_id, current, viewer))

    async def complete(self, job_id: str, viewer: Viewer = EVERYONE) -> View:
        """The client is done. Raises JobNotFound, JobConflict, JobsUnavailable."""
        return await self._change(job_id, lambda book: book.complete(job_id, viewer))

    async def fail(self, job_id: str, error: str, viewer: Viewer = EVERYONE) -> View:
        """The client gave up. Raises JobNotFound, JobConflict, JobsUnavailable."""
        return await self._change(job_id, lambda book: book.fail(job_id, JobEvent.FAIL, error, viewer))

    async def cancel(self, job_id: str, viewer: Viewer = EVERYONE) -> View:
        """Somebody cancelled it. Raises JobNotFound, JobConflict, JobsUnavailable."""
        return await self._change(job_id, lambda book: book.fail(job_id, JobEvent.CANCEL, "cancelled", viewer))

    async def clear_ended(self, viewer: Viewer = EVERYONE) -> int:
        """Forget the jobs that have ended; how many they were. Raises JobsUnavailable."""
        count, _ = await self._transact(lambda book: book.clear_ended(viewer))
        return count

    async def overview(
        self,
        limit: int = ENDED_SHOWN,
        state: JobStatus | None = None,
        project: str | None = None,
        viewer: Viewer = EVERYONE,
    ) -> View:
        """All of `GET /jobs`; `limit` is of the recent ones. Raises JobsUnavailable."""
        _, views = await self._transact(_only_what_is_due)
        return views.overview(limit, state, project, viewer)

    def page(self, query: JobQuery, viewer: Viewer = EVERYONE) -> tuple[JobPage, Views]:
        """Some of the viewer's jobs as they were last seen, which is a second ago at most. Asks no store."""
        views = self._views()
        return views.page(query, viewer), views

    def project(self, job_id: str, viewer: Viewer = EVERYONE) -> str | None:
        """What the viewer's open job is of, as last seen; None where there is no such job."""
        job = self._ledger().open.get(job_id)
        return job.project if job is not None and viewer.sees(job.owner) else None

    async def sweep(self) -> None:
        """Fail jobs whose lease has run out and fill free places. Raises JobsUnavailable."""
        await self._transact(_only_what_is_due)

    def touch(self, job_id: str, viewer: Viewer = EVERYONE) -> None:
        """Soon renew the lease of the viewer's job whose id a request carried; any other id is ignored."""
        job = None if self._store is None else self._store.ledger.open.get(job_id)
        if self._store is None or job is None or job_id in self._touching or not viewer.sees(job.owner):
            return
        renewed_at = job.lease_until - self._settings.job_lease_seconds
        if self._store.now() - renewed_at < min(TOUCH_SECONDS, self._settings.job_lease_seconds / 4):
            return
        self._touching.add(job_id)
        self._keep(asyncio.create_task(self._touch(job_id)))

    def count(self, status: JobStatus) -> int:
        """How many jobs were in a state when last seen. Raises nothing."""
        ledger = self._ledger()
        return sum(job.status is status for job in (*ledger.open.values(), *ledger.ended.values()))

    def follow(self, idle_seconds: float, viewer: Viewer = EVERYONE) -> AsyncGenerator[list[bytes], None]:
        """The open jobs and the last that ended, then each job whenever it changes, as JSON; nothing after
        `idle_seconds`.

        Ends with the server's own end. Raises JobsUnavailable before the queue is open, Overloaded where too many
        follow.
        """
        self._opened()
        return self._followers.follow(idle_seconds, viewer)

    def end_following(self) -> None:
        """End every follower, and whoever begins to follow."""
        self._followers.end()

    async def _change(self, job_id: str, change: Callable[[Book], None]) -> View:
        _, views = await self._transact(change)
        return views.find(job_id)

    async def _transact(self, change: Callable[[Book], T]) -> tuple[T, Views]:
        """What the change returned, and the jobs after it, once they are kept.

        It goes on when its caller is cancelled: what a client reports counts even if the client leaves at once.
        """
        transaction = asyncio.create_task(self._announced(self._opened().transact(change)))
        outcome = await asyncio.shield(self._keep(transaction))
        self._look(outcome.ledger)
        return outcome.value(), Views(outcome.ledger, self._settings, outcome.now, self._rate_of)

    def _look(self, ledger: Ledger) -> None:
        if self._reports is not None:
            self._reports.look(ledger)

    def _rate_of(self, job_id: str) -> float:
        """Texts per second of an open job.

        By what was answered in its name; or by what it reported, if that is more: its client need not tag its requests,
        and may send them to several servers.
        """
        answered = self._rates.per_second(self._rates.texts_of_job(job_id))
        return max(answered, self._reports.per_second(job_id, self._rates.span()) if self._reports else 0.0)

    async def _announced(self, transaction: Coroutine[Any, Any, T]) -> T:
        """Run a transaction, then tell whoever follows the jobs."""
        try:
            return await transaction
        finally:
            self._followers.wake()

    async def _touch(self, job_id: str) -> None:
        try:
            with suppress(VecmillError):  # the job has just ended, or is renewed by the next request
                await self.get(job_id)
        finally:
            self._touching.discard(job_id)

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                await self.sweep()
            except JobsUnavailable as error:
                logger.debug(error.message)
            except Exception:
                logger.exception("the sweep of the jobs failed")
            await asyncio.sleep(SWEEP_SECONDS)

    def _keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved, its caller may be gone

    def _opened(self) -> JobStore:
        if self._store is None:
            raise JobsUnavailable
        return self._store

    def _ledger(self) -> Ledger:
        return Ledger() if self._store is None else self._store.ledger

    def _views(self) -> Views:
        now = 0.0 if self._store is None else self._store.now()
        return Views(self._ledger(), self._settings, now, self._rate_of)


def _only_what_is_due(book: Book) -> None:
    """A transaction without a change of its own: leases that have run out, places that are free."""
