"""Queues on real stores, with time that is moved by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vecmill.config import JobSettings
from vecmill.core.clock import Clock
from vecmill.core.errors import JobsUnavailable
from vecmill.core.protocols import StoredJobs
from vecmill.jobs.local import LocalJobs
from vecmill.jobs.queue import JobQueue, JobStore
from vecmill.jobs.shared import SharedJobs
from vecmill.storage.redis import RedisJobs
from vecmill.storage.sqlite_jobs import SqliteJobs

SETTINGS = JobSettings(jobs_max_active=1, job_lease_seconds=100, jobs_max_wait_seconds=1_000_000)


@dataclass
class Hand:
    """A clock that tests move."""

    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


class HandTimed(RedisJobs):
    """Jobs in Redis, with the test's clock in place of Redis's TIME."""

    def __init__(self, url: str, time: Callable[[], float]) -> None:
        super().__init__(url)
        self._hand = time

    async def read(self, after: int) -> StoredJobs:
        """The stored jobs, at the test's time."""
        return replace(await super().read(after), time=self._hand())


def in_memory(hand: Hand, settings: JobSettings = SETTINGS) -> LocalJobs:
    return LocalJobs(settings, None, Clock(hand, hand))


def on_sqlite(folder: Path, hand: Hand, settings: JobSettings = SETTINGS, wall: Hand | None = None) -> LocalJobs:
    return LocalJobs(settings, SqliteJobs(folder / "jobs.db"), Clock(wall or hand, hand))


def on_redis(url: str, hand: Hand, settings: JobSettings = SETTINGS, server_time: Hand | None = None) -> SharedJobs:
    return SharedJobs(settings, HandTimed(url, server_time or hand), hand)


async def opened(store: JobStore, settings: JobSettings = SETTINGS) -> JobQueue:
    queue = JobQueue(settings)
    await queue.open(store)
    return queue


async def ids(queue: JobQueue) -> dict[str, list[str]]:
    """The ids of each list."""
    listed = await queue.overview(limit=1000)
    return {name: [job["id"] for job in listed[name]] for name in ("active", "queued", "recent")}


async def later(queue: JobQueue, hand: Hand, seconds: float, *alive: dict[str, Any]) -> None:
    """Let time pass, with a sweep each second as in the server, while the clients of the jobs in `alive` poll."""
    for _ in range(int(seconds)):
        hand.now += 1
        with suppress(JobsUnavailable):
            await queue.sweep()
        for job in alive:
            await queue.get(job["id"])
