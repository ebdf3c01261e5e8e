"""Jobs that several servers share: read for each transaction, written if nobody else wrote meanwhile."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic

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

PATIENCE_SECONDS = 5.0  # with other servers that change the jobs at the same time
PAUSE_SECONDS = 0.02  # between attempts, at the most
TURN_AFTER = 4  # attempts: then the others are asked to wait
MOST_TOGETHER = 64  # transactions of this server in one commit
RETRY_SECONDS = 1.0
# If no server has written the time for this long, no client could report: every lease is renewed.
GAP_SECONDS = 15.0


class _Crowded(Exception):
    """Other servers wrote before this one again and again."""


class _Waiting(Generic[T]):
    """A transaction that waits to be part of a commit."""

    def __init__(self, change: Callable[[Book], T]) -> None:
        self.change = change
        self.outcome: TransactionResult[T] | None = None
        self.unavailable: JobsUnavailable | None = None

    @property
    def ended(self) -> bool:
        return self.outcome is not None or self.unavailable is not None

    def result(self) -> TransactionResult[T]:
        if self.unavailable is not None:
            raise self.unavailable.again()
        assert self.outcome is not None
        return self.outcome


class SharedJobs:
    """The store has the truth; memory holds what was last read.

    Transactions that come while another is on its way are committed together: however many clients a server has, it
    competes with the other servers by one commit at a time.
    """

    def __init__(self, settings: JobSettings, records: RedisJobs, monotonic: Callable[[], float] = monotonic) -> None:
        self.ledger = Ledger()
        self._settings = settings
        self._records = records
        self._monotonic = monotonic
        self._time = SharedTime(monotonic)
        self._decoded: dict[str, tuple[bytes, Job]] = {}  # an unchanged record stays the same job
        self._waiting: list[_Waiting[Any]] = []
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
        waiting = _Waiting(change)
        self._waiting.append(waiting)
        async with self._lock:
            if not waiting.ended:
                together, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
                await self._run(together)
        return waiting.result()

    async def _run(self, together: Sequence[_Waiting[Any]]) -> None:
        """End each of the transactions, in order, in one commit."""
        unavailable = JobsUnavailable()
        try:
            if self._failed_at is None or self._monotonic() >= self._failed_at + RETRY_SECONDS:
                outcomes = await self._transact([waiting.change for waiting in together])
                for waiting, outcome in zip(together, outcomes, strict=True):
                    waiting.outcome = outcome
                self._worked()
        except _Crowded:
            unavailable = JobsUnavailable("503: too many servers change the jobs at one time; try again.")
        except JobsUnavailable as error:
            self._failed(error)
        finally:
            for waiting in together:
                waiting.unavailable = None if waiting.outcome is not None else unavailable

    def _worked(self) -> None:
        if self._failed_at is not None:
            logger.warning("the store of jobs can be used again")
        self._failed_at = None

    def _failed(self, error: JobsUnavailable) -> None:
        if self._failed_at is None:
            logger.error("%s /jobs answers 503 until it can be used.", error.message)
        self._failed_at = self._monotonic()

    async def close(self) -> None:
        """Close the store."""
        await self._records.close()

    async def _transact(self, wanted: Sequence[Callable[[Book], Any]]) -> Sequence[TransactionResult[Any]]:
        """Read, change, and write if nobody else wrote meanwhile; again until that is so.

        Raises:
            _Crowded: it was never so. JobsUnavailable: the store does not answer.
        """
        turn, has_turn, number = secrets.token_hex(8).encode(), False, 0
        tried: tuple[bytes, Sequence[TransactionResult[Any]]] | None = None
        deadline = monotonic() + PATIENCE_SECONDS
        try:
            while monotonic() < deadline:
                stored = await self._records.read(self.ledger.totals.sequence)
                if tried is not None and stored.meta == tried[0]:
                    return tried[1]  # the confirmation was lost on the way, not the commit
                if stored.turn is None or stored.turn == turn:
                    tried, committed = await self._attempt(stored, wanted)
                    if committed:
                        return tried[1]
                    number += 1
                    if number >= TURN_AFTER and not has_turn:
                        has_turn = await self._records.take_turn(turn)
                # Servers that collide wait for different times before they try again.
                await asyncio.sleep(PAUSE_SECONDS * min(1.0, number / 4) * secrets.randbelow(1000) / 1000)
            raise _Crowded
        finally:
            if has_turn:
                await self._records.end_turn(turn)

    async def _attempt(
        self, stored: StoredJobs, wanted: Sequence[Callable[[Book], Any]]
    ) -> tuple[tuple[bytes, Sequence[TransactionResult[Any]]], bool]:
        """One attempt: what it would have written and what it gave, and whether it was written."""
        before, known = self._before(stored)
        now = self._time.after(before.totals, stored.time)
        outcomes: list[TransactionResult[Any]] = []
        ledger = before
        for change in wanted:
            book = Book(ledger, self._settings, now)
            if not outcomes and now - before.totals.time > GAP_SECONDS:
                book.resume()
            outcomes.append(attempt(book, change))
            ledger = outcomes[-1].ledger
        totals = replace(ledger.totals, server_time=stored.time, token=secrets.token_hex(8))
        ledger = replace(ledger, totals=totals)
        late = self._time.is_late(before.totals, now, stored.time)
        changed = changes(before if known else None, ledger, leases=True, always=late)
        if changed is None:
            ledger = replace(ledger, totals=before.totals)
        committed = changed is None or await self._records.commit(stored.meta, changed)
        if committed:
            self.ledger = ledger
            self._time.seen(now)
        return (b"" if changed is None else changed.meta, outcomes), committed

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
