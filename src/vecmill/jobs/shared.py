"""Jobs that several servers share: read for each transaction, written if nobody else wrote meanwhile."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from vecmill.config import JobSettings
from vecmill.core.errors import JobsUnavailable
from vecmill.core.protocols import StoredJobs
from vecmill.jobs.job import Job
from vecmill.jobs.state import (
    Book,
    JobTotals,
    Ledger,
    T,
    TransactionResult,
    attempt,
    changes,
    decode,
    decode_job,
    decode_totals,
    ledger_of,
)

if TYPE_CHECKING:  # importing it needs the extra `redis`
    from vecmill.storage.redis import RedisJobs


# The time is written at least this often (seconds), even if nothing else changes.
HEARTBEAT_SECONDS = 5.0
# Seconds that the store's clock may gain on this machine's between two reads: drift and latency.
SLACK_SECONDS = 2.0


class SharedTime:
    """The time of servers that share their jobs: it never goes back and never jumps.

    It advances from the last written time by what the store's clock has moved since, limited to what this machine's
    monotonic clock allows (SLACK_SECONDS).
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._seen: tuple[float, float] | None = None  # the time, and the monotonic time when it was that

    def __call__(self) -> float:
        """The time now, by this machine's clock since the last `seen`."""
        if self._seen is None:
            return 0.0
        time, at = self._seen
        return time + self._monotonic() - at

    def after(self, written: JobTotals, server_time: float) -> float:
        """The time when the store's clock shows `server_time`."""
        if not written.token:
            return max(server_time, written.time)
        now = written.time + max(0.0, server_time - written.server_time)
        if self._seen is None:
            return now
        return max(written.time, min(now, self() + SLACK_SECONDS))

    def seen(self, now: float) -> None:
        """Record that the time is `now`."""
        self._seen = (now, self._monotonic())

    def is_late(self, written: JobTotals, now: float, server_time: float) -> bool:
        """Whether the time must be written: it is due, or the store's clock was set."""
        moved = server_time - written.server_time
        return now - written.time > HEARTBEAT_SECONDS or moved < 0 or moved > now - written.time + 1e-3


logger = logging.getLogger(__name__)

ATTEMPTS = 30
PAUSE_SECONDS = 0.02  # between attempts, at the most
RETRY_SECONDS = 1.0
# If no server has written the time for this long, no client could report: every lease is renewed.
GAP_SECONDS = 15.0


class SharedJobs:
    """The store has the truth; memory holds what was last read."""

    def __init__(self, settings: JobSettings, records: RedisJobs, monotonic: Callable[[], float] = monotonic) -> None:
        self.ledger = Ledger()
        self._settings = settings
        self._records = records
        self._monotonic = monotonic
        self._time = SharedTime(monotonic)
        self._decoded: dict[str, tuple[bytes, Job]] = {}  # an unchanged record stays the same job
        self._fresh = True
        self._failed_at: float | None = None
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Read what is stored; if the store does not answer, the next transaction reads it."""
        try:
            await self.transact(lambda book: None)
        except JobsUnavailable as error:
            logger.debug(error.message)

    @property
    def problem(self) -> str | None:
        """Why there are no jobs; None where there are."""
        return None if self._failed_at is None else "Redis cannot be used; /jobs answers 503 until it can."

    def now(self) -> float:
        """Unix time by the clock of leases, as far as known here."""
        return self._time()

    async def transact(self, change: Callable[[Book], T]) -> TransactionResult[T]:
        """Change the jobs. Raises JobsUnavailable at once while the store fails."""
        async with self._lock:
            if self._failed_at is not None and self._monotonic() < self._failed_at + RETRY_SECONDS:
                raise JobsUnavailable
            try:
                outcome = await self._transact(change)
            except JobsUnavailable as error:
                if self._failed_at is None:
                    logger.error("%s /jobs answers 503 until it can be used.", error.message)
                self._failed_at = self._monotonic()
                raise JobsUnavailable from None
            if self._failed_at is not None:
                logger.warning("the store of jobs can be used again")
                self._failed_at = None
        return outcome

    async def close(self) -> None:
        """Close the store."""
        await self._records.close()

    async def _transact(self, change: Callable[[Book], T]) -> TransactionResult[T]:
        tried: bytes | None = None
        outcome: TransactionResult[T] | None = None
        for number in range(ATTEMPTS):
            stored = await self._records.read(self.ledger.totals.sequence)
            if outcome is not None and stored.meta == tried:  # the confirmation was lost on the way, not the commit
                return outcome
            before, known = self._before(stored)
            now = self._time.after(before.totals, stored.time)
            outcome = attempt(self._book(before, now), change)
            totals = replace(outcome.ledger.totals, server_time=stored.time, token=secrets.token_hex(8))
            ledger = replace(outcome.ledger, totals=totals)
            late = self._time.is_late(before.totals, now, stored.time)
            changed = changes(before if known else None, ledger, leases=True, always=late)
            if changed is None:
                ledger = replace(ledger, totals=before.totals)
            if changed is None or await self._records.commit(stored.meta, changed):
                self._seen(ledger, now)
                return outcome
            tried = changed.meta
            # Servers that collide wait for different times before they try again.
            await asyncio.sleep(PAUSE_SECONDS * min(1.0, number / 4) * secrets.randbelow(1000) / 1000)
        raise JobsUnavailable("Too many servers change the jobs at one time.")

    def _before(self, stored: StoredJobs) -> tuple[Ledger, bool]:
        """The jobs as they are, and whether the store holds them: what a store has lost, this server still knows."""
        totals = decode_totals(stored.meta)
        if totals is None or totals.sequence < self.ledger.totals.sequence:
            return (self.ledger if self.ledger.totals.sequence else decode(stored)), False
        open_jobs = [job for job_id, record in stored.open.items() if (job := self._job(job_id, record)) is not None]
        new = [job for record in stored.ended if (job := decode_job(record)) is not None]
        ended = [job for job in (*self.ledger.ended.values(), *new) if job.ended_number > totals.forgotten]
        self._decoded = {job_id: decoded for job_id, decoded in self._decoded.items() if job_id in stored.open}
        return ledger_of(open_jobs, ended, totals), True

    def _job(self, job_id: str, record: bytes) -> Job | None:
        known = self._decoded.get(job_id)
        if known is not None and known[0] == record:
            return known[1]
        if (job := decode_job(record)) is not None:
            self._decoded[job_id] = (record, job)
        return job

    def _book(self, before: Ledger, now: float) -> Book:
        book = Book(before, self._settings, now)
        if self._fresh or now - before.totals.time > GAP_SECONDS:
            book.resume()
        return book

    def _seen(self, ledger: Ledger, now: float) -> None:
        self._fresh = False
        self.ledger = ledger
        self._time.seen(now)
