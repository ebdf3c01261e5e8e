"""The queue of jobs as its callers see it: every call is one transaction on what is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from vecmill.config import JobSettings
from vecmill.core.errors import JobsUnavailable, VecmillError
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.book import Book
from vecmill.jobs.following import Followers
from vecmill.jobs.job import View
from vecmill.jobs.ledger import Ledger
from vecmill.jobs.store import JobStore, T, Work
from vecmill.jobs.transitions import JobEvent, JobStatus
from vecmill.jobs.views import ENDED_SHOWN, Views

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
# Seconds between renewals of a job's lease by tagged requests, which may be many in a second.
TOUCH_SECONDS = 5.0


class JobQueue:
    """First come first served, a few active at a time, the abandoned given up.

    Belongs to the event loop's thread. Until `open`, and while a shared store does not answer, calls raise
    JobsUnavailable.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._store: JobStore | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._touching: set[str] = set()
        self._followers = Followers(self._views)

    async def open(self, store: JobStore) -> None:
        """Go on with what the store keeps. Raises nothing."""
        await store.open()
        self._store = store

    @property
    def problem(self) -> str | None:
        """Why the jobs cannot be kept, or used, now; None where they can."""
        return "The jobs are not open yet." if self._store is None else self._store.problem

    def start(self) -> None:
        """Sweep every second until `close`."""
        self._keep(asyncio.create_task(self._sweep_for_ever(), name="jobs"))

    async def close(self) -> None:
        """Keep what is under way, then let go of the store."""
        self.end_following()
        for task in self._tasks:
            if task.get_name() == "jobs":
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._store is not None:
            await self._store.close()
            self._store = None

    async def register(self, project: str, total_chunks: int, instance_id: str, viewer: Viewer = EVERYONE) -> View:
        """A new job, of the viewer. Position 0 is active, 1 the first that waits.

        Raises:
            Overloaded: too many jobs are open. JobsUnavailable.
        """

        def work(book: Book) -> Callable[[Views], View]:
            job_id = book.register(project, total_chunks, instance_id, viewer)
            return lambda views: views.one(job_id)

        return await self._transact(work)

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

        def work(book: Book) -> Callable[[Views], int]:
            count = book.clear_ended(viewer)
            return lambda views: count

        return await self._transact(work)

    async def overview(
        self,
        limit: int = ENDED_SHOWN,
        state: JobStatus | None = None,
        project: str | None = None,
        viewer: Viewer = EVERYONE,
    ) -> View:
        """All of `GET /jobs`; `limit` is of the recent ones. Raises JobsUnavailable."""
        return await self._transact(lambda book: lambda views: views.overview(limit, state, project, viewer))

    async def sweep(self) -> None:
        """Do what is due by itself. Raises JobsUnavailable."""
        await self._transact(lambda book: lambda views: None)

    def touch(self, job_id: str, viewer: Viewer = EVERYONE) -> None:
        """Renew the lease of a job of the viewer that tagged other work with its id, soon; other ids are let be."""
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
        """End all that follow, and whoever begins to."""
        self._followers.end()

    async def _change(self, job_id: str, change: Callable[[Book], None]) -> View:
        def work(book: Book) -> Callable[[Views], View]:
            change(book)
            return lambda views: views.one(job_id)

        return await self._transact(work)

    async def _transact(self, work: Work[T]) -> T:
        """Not ended by its caller's end: a client that leaves at once has reported all the same."""
        return await asyncio.shield(self._keep(asyncio.create_task(self._announced(self._opened().transact(work)))))

    async def _announced(self, transaction: Coroutine[Any, Any, T]) -> T:
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
            task.exception()  # of one whose caller has left: it has been seen

    def _opened(self) -> JobStore:
        if self._store is None:
            raise JobsUnavailable
        return self._store

    def _ledger(self) -> Ledger:
        return Ledger() if self._store is None else self._store.ledger

    def _views(self) -> Views:
        return Views(self._ledger(), self._settings, 0.0 if self._store is None else self._store.now())
