"""Who wants to hear of every change, and what each has heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import Job, View
from vecmill.jobs.views import ENDED_SHOWN, Views

AT_A_TIME = 64  # views that are made before a reader has taken the last ones


class Follower:
    """One reader. Remembers which version of each job it has had, not what it has missed: a slow one skips states."""

    def __init__(self, viewer: Viewer = EVERYONE) -> None:
        self.wake = asyncio.Event()
        self._viewer = viewer
        self._had: dict[str, tuple[int, int]] = {}
        self._ended: int | None = None  # number of the last ended job it has had

    def news(self, views: Views) -> list[View]:
        """Some of the jobs that have changed, as they are now; empty if none has."""
        open_jobs = views.ledger.open
        self._had = {job_id: had for job_id, had in self._had.items() if job_id in open_jobs}
        changed = [*self._ends(views), *self._changes(views)][:AT_A_TIME]
        for job in changed:
            if job.status.ended:
                self._ended = job.ended_number
            else:
                self._had[job.id] = _state(job, views)
        return [views.of(job) for job in changed]

    def _changes(self, views: Views) -> list[Job]:
        mine = (job for job in views.ledger.open.values() if views.ledger.shows(job, self._viewer))
        return [job for job in mine if self._had.get(job.id) != _state(job, views)]

    def _ends(self, views: Views) -> list[Job]:
        ended = [job for job in views.ledger.ended.values() if views.ledger.shows(job, self._viewer)]
        if self._ended is None:
            ended = ended[-ENDED_SHOWN:]
            self._ended = ended[0].ended_number - 1 if ended else 0
        return [job for job in ended if job.ended_number > self._ended]


def _state(job: Job, views: Views) -> tuple[int, int]:
    return job.version, views.position(job)


class Followers:
    """All readers of the changes."""

    def __init__(self, views: Callable[[], Views]) -> None:
        self._views = views
        self._all: set[Follower] = set()
        self._over = False

    async def follow(self, idle_seconds: float, viewer: Viewer = EVERYONE) -> AsyncGenerator[list[View], None]:
        """What is, then what changes; an empty list after `idle_seconds` without a change."""
        follower = Follower(viewer)
        self._all.add(follower)
        try:
            while not self._over:
                follower.wake.clear()
                if news := follower.news(self._views()):
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
        for follower in self._all:
            follower.wake.set()

    def end(self) -> None:
        """No more, for anybody."""
        self._over = True
        self.wake()
