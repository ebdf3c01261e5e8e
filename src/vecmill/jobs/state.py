"""All jobs at one moment: the rules of the queue, and how the jobs become bytes and are read back."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast

import orjson
from pydantic import TypeAdapter, ValidationError

from vecmill.config import JobSettings
from vecmill.core.errors import InvalidInput, JobNotFound, Overloaded, VecmillError
from vecmill.core.protocols import JobChanges, StoredJobs
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import Job, JobEvent, JobStatus, Pace, after

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobTotals:
    """What is kept about all jobs together."""

    sequence: int = 0
    """Counts registrations and ends."""
    forgotten: int = 0
    """Ended jobs up to this number are gone."""
    cleared: Mapping[str, int] = field(default_factory=dict)
    """By owner: its ended jobs up to this number are shown no more."""
    pace: Pace = field(default_factory=Pace)
    counted_at: float = 0.0
    """Until when `pace` has counted."""
    time: float = 0.0
    """When this was written, by the queue's clock."""
    server_time: float = 0.0
    """The same by the clock of a shared store."""
    token: str = ""
    """Of the commit that wrote this, so that no two are equal."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """All jobs, immutable: every change makes a new ledger."""

    open: Mapping[str, Job] = field(default_factory=dict)
    """Queued and active, in order of registration."""
    ended: Mapping[str, Job] = field(default_factory=dict)
    """In order of ending."""
    totals: JobTotals = field(default_factory=JobTotals)

    def find(self, job_id: str, viewer: Viewer) -> Job:
        """A job that is the viewer's.

        Raises:
            JobNotFound: there is none, or it is somebody else's, which is told alike.
        """
        job = self.open.get(job_id) or self.ended.get(job_id)
        if job is None or not self.shows(job, viewer):
            raise JobNotFound(f"There is no job {job_id[:80]!r}; register one with POST /jobs.", param="job_id")
        return job

    def shows(self, job: Job, viewer: Viewer) -> bool:
        """Whether a job is the viewer's, and the viewer has not cleared it away."""
        if viewer.everything or job.owner != viewer.owner:
            return viewer.everything
        return not job.status.ended or job.ended_number > self.totals.cleared.get(viewer.owner or "", 0)

    @property
    def latest(self) -> float:
        """The latest time in the ledger, leases excluded."""
        times = [self.totals.time]
        for job in (*self.open.values(), *self.ended.values()):
            times += [job.created_at, job.counted_at or 0.0, job.completed_at or 0.0]
        return max(times)


_JOB = TypeAdapter(Job)
_TOTALS = TypeAdapter(JobTotals)


def ledger_of(open_jobs: Iterable[Job], ended: Iterable[Job], totals: JobTotals) -> Ledger:
    """A ledger with its jobs in order, whatever order they are given in."""
    return Ledger(
        {job.id: job for job in sorted(open_jobs, key=lambda job: job.number)},
        {job.id: job for job in sorted(ended, key=lambda job: job.ended_number)},
        totals,
    )


def decode_job(record: bytes) -> Job | None:
    """The stored job; None if it cannot be read, which loses this job alone."""
    try:
        return _JOB.validate_json(record)
    except ValidationError:
        logger.error("a stored job cannot be read: it is left out")
        return None


def decode_totals(meta: bytes | None) -> JobTotals | None:
    """The stored totals; None if there are none, or they cannot be read."""
    if meta is None:
        return None
    try:
        return _TOTALS.validate_json(meta)
    except ValidationError:
        logger.error("the stored totals of the jobs cannot be read: they are counted anew")
        return None


def decode(stored: StoredJobs) -> Ledger:
    """The stored jobs, as far as they can be read."""
    jobs = [job for record in stored.open.values() if (job := decode_job(record)) is not None]
    ended = [job for record in stored.ended if (job := decode_job(record)) is not None]
    highest = max((max(job.number, job.ended_number) for job in (*jobs, *ended)), default=0)
    totals = decode_totals(stored.meta) or JobTotals()
    return ledger_of(jobs, ended, replace(totals, sequence=max(totals.sequence, highest)))


def changes(old: Ledger | None, new: Ledger, *, leases: bool, always: bool = False) -> JobChanges | None:
    """What to write to turn a stored `old` (None: unknown) into `new`; None if nothing has changed.

    Without `leases` a renewed lease alone is not a change. `always` writes the totals even if nothing has changed.
    """
    was = Ledger() if old is None else old
    written = {
        job.id: orjson.dumps(job) for job in new.open.values() if _differs(was.open.get(job.id), job, leases=leases)
    }
    closed = [job_id for job_id in was.open if job_id not in new.open]
    ended = [
        (job.ended_number, orjson.dumps(job))
        for job in new.ended.values()
        if old is None or job.ended_number > old.totals.sequence
    ]
    same = not written and not closed and not ended and new.totals.forgotten == was.totals.forgotten
    same = same and new.totals.cleared == was.totals.cleared
    if same and old is not None and not always:
        return None
    return JobChanges(written, closed, ended, new.totals.forgotten, orjson.dumps(new.totals), whole=old is None)


def joined(earlier: Ledger, later: Ledger) -> Ledger:
    """The jobs of two ledgers with separate numbering, `later` renumbered to follow `earlier`."""
    shift = earlier.totals.sequence
    open_jobs = [replace(job, number=job.number + shift) for job in later.open.values()]
    ended = [
        replace(job, number=job.number + shift, ended_number=job.ended_number + shift) for job in later.ended.values()
    ]
    totals = replace(
        later.totals if later.totals.pace.rate is not None else earlier.totals,
        sequence=shift + later.totals.sequence,
        forgotten=earlier.totals.forgotten,
        cleared={
            **earlier.totals.cleared,
            **{owner: shift + number for owner, number in later.totals.cleared.items()},
        },
    )
    return ledger_of([*earlier.open.values(), *open_jobs], [*earlier.ended.values(), *ended], totals)


def _differs(old: Job | None, new: Job, *, leases: bool) -> bool:
    return old is not new and (leases or old is None or old.version != new.version)


ENDED_KEPT = 1000
# More open jobs than any office has editors; a client that registers without end must not fill the memory.
OPEN_JOBS_MAX = 1000
# Seconds that count 1/e of the present, for the pace of one job and for that of all.
JOB_PACE_SECONDS = 30.0
TOTAL_PACE_SECONDS = 60.0


class Book:
    """The rules of the queue (order, places, leases, waits), applied to a working copy of a ledger at one moment.

    Made for one attempt of a transaction. It does no I/O.
    """

    def __init__(self, ledger: Ledger, settings: JobSettings, now: float) -> None:
        self.now = now
        self._settings = settings
        self._open = dict(ledger.open)
        self._ended = dict(ledger.ended)
        self._totals = ledger.totals

    def ledger(self) -> Ledger:
        """The ledger as changed so far."""
        return Ledger(self._open, self._ended, replace(self._totals, time=self.now))

    def tick(self) -> None:
        """Do what is due: fail jobs whose lease has run out, then activate queued jobs while there are places."""
        silent = f"abandoned: no sign from its client for {self._settings.job_lease_seconds:g} seconds"
        for job in [job for job in self._open.values() if job.lease_until < self.now]:
            self._end(job, JobEvent.ABANDON, silent)
        self._fill()

    def resume(self) -> None:
        """Give every open job a full lease, after a time in which no client could report.

        How long the client worked in that time is unknown, so its next report does not count towards the pace.
        """
        for job in self._open.values():
            self._open[job.id] = replace(job, lease_until=self._lease(), counted_at=None)
        self._totals = replace(self._totals, counted_at=self.now)

    def register(self, project: str, total_chunks: int, instance_id: str, viewer: Viewer = EVERYONE) -> str:
        """The id of a new job, which belongs to the viewer.

        Raises:
            Overloaded: too many jobs are open, of all clients or of this key.
        """
        if len(self._open) >= OPEN_JOBS_MAX:
            raise Overloaded(f"The server is temporarily overloaded: {len(self._open)} jobs are open.")
        own = sum(job.owner == viewer.owner for job in self._open.values())
        if viewer.limits.jobs is not None and own >= viewer.limits.jobs:
            raise Overloaded(
                f"{own} jobs of this API key are open, which is its limit (`jobs`), so that another is temporarily not "
                f"possible: complete or cancel one."
            )
        job = Job(
            id=secrets.token_hex(8),
            number=self._next(),
            project=project,
            total_chunks=total_chunks,
            instance_id=instance_id,
            created_at=self.now,
            lease_until=self._lease(),
            counted_at=self.now,
            owner=viewer.owner,
        )
        self._open[job.id] = job
        self._fill()
        logger.info("job registered", extra={"job": job.id, "chunks": total_chunks})
        return job.id

    def renew(self, job_id: str, viewer: Viewer = EVERYONE) -> None:
        """Renew the lease of a job that has not ended. Raises JobNotFound."""
        job = self._find(job_id, viewer)
        if not job.status.ended:
            self._open[job.id] = replace(job, lease_until=self._lease())

    def progress(self, job_id: str, current: int, viewer: Viewer = EVERYONE) -> None:
        """Record how many chunks are done.

        Raises:
            InvalidInput: below zero or above the job's total. JobNotFound, JobConflict.
        """
        job = self._find(job_id, viewer)
        status = after(job.id, job.status, JobEvent.PROGRESS)
        if not 0 <= current <= job.total_chunks:
            raise InvalidInput(f"`current` is {current}; this job has 0 to {job.total_chunks} chunks.", param="current")
        self._change(self._counted(job, current), status=status, lease_until=self._lease())

    def complete(self, job_id: str, viewer: Viewer = EVERYONE) -> None:
        """The client is done. Raises JobNotFound, JobConflict."""
        job = self._find(job_id, viewer)
        after(job.id, job.status, JobEvent.COMPLETE)
        self._end(self._counted(job, job.total_chunks), JobEvent.COMPLETE)

    def fail(self, job_id: str, event: JobEvent, error: str, viewer: Viewer = EVERYONE) -> None:
        """Its client gave up, or somebody cancelled it. Raises JobNotFound, JobConflict."""
        self._end(self._find(job_id, viewer), event, error)

    def clear_ended(self, viewer: Viewer = EVERYONE) -> int:
        """Forget the ended jobs (a viewer of everything), or hide the viewer's own; returns how many."""
        ledger = self.ledger()
        shown = sum(ledger.shows(job, viewer) for job in self._ended.values())
        if viewer.everything:
            self._forget(len(self._ended))
        elif shown:
            latest = next(reversed(self._ended.values())).ended_number
            # Entries of owners whose ended jobs are all forgotten are dropped.
            kept = {owner: number for owner, number in self._totals.cleared.items() if number > self._totals.forgotten}
            self._totals = replace(self._totals, cleared={**kept, viewer.owner or "": latest})
        return shown

    def _find(self, job_id: str, viewer: Viewer) -> Job:
        return self.ledger().find(job_id, viewer)

    def _change(self, job: Job, **fields: Any) -> Job:
        changed = replace(job, version=job.version + 1, **fields)
        self._open[job.id] = changed
        return changed

    def _counted(self, job: Job, current: int) -> Job:
        """The job with its new progress, which is counted in its own pace and in the total one."""
        if job.counted_at is None:
            return replace(job, current=current, counted_at=self.now)
        done = max(0, current - job.current)
        totals = self._totals
        # A pause longer than the averaging window says nothing about how fast the machine is.
        since = min(self.now - totals.counted_at, TOTAL_PACE_SECONDS)
        self._totals = replace(totals, pace=totals.pace.plus(done, since, TOTAL_PACE_SECONDS), counted_at=self.now)
        pace = job.pace.plus(done, self.now - job.counted_at, JOB_PACE_SECONDS)
        return replace(job, current=current, pace=pace, counted_at=self.now)

    def _fill(self) -> None:
        """Activate queued jobs in order while there are places; one that has waited too long needs none."""
        queued = [job for job in self._open.values() if job.status is JobStatus.QUEUED]
        active = len(self._open) - len(queued)
        for job in queued:
            if active >= self._settings.jobs_max_active and not self._waited(job):
                return
            if active == 0:  # idle time does not count towards the pace
                self._totals = replace(self._totals, counted_at=self.now)
            status = after(job.id, job.status, JobEvent.ACTIVATE)
            self._change(job, status=status, started_at=self.now, counted_at=self.now)
            active += 1

    def _waited(self, job: Job) -> bool:
        return self.now - job.created_at >= self._settings.jobs_max_wait_seconds

    def _end(self, job: Job, event: JobEvent, error: str | None = None) -> None:
        status = after(job.id, job.status, event)
        ended = self._change(job, status=status, error=error, completed_at=self.now, ended_number=self._next())
        del self._open[job.id]
        self._ended[job.id] = ended
        self._forget(len(self._ended) - ENDED_KEPT)
        logger.info("job ended", extra={"job": job.id, "status": status.value, "chunks": job.current})
        self._fill()

    def _forget(self, count: int) -> None:
        for job in list(self._ended.values())[: max(0, count)]:
            del self._ended[job.id]
            self._totals = replace(self._totals, forgotten=job.ended_number)

    def _next(self) -> int:
        self._totals = replace(self._totals, sequence=self._totals.sequence + 1)
        return self._totals.sequence

    def _lease(self) -> float:
        return self.now + self._settings.job_lease_seconds


@dataclass(frozen=True, slots=True)
class TransactionResult(Generic[T]):
    """What one transaction made of the jobs, and what it returned or was refused with; told once the jobs are kept."""

    ledger: Ledger
    now: float
    returned: T | None = None
    refusal: VecmillError | None = None

    def value(self) -> T:
        """What the change returned. Raises what it raised."""
        if self.refusal is not None:
            raise self.refusal
        return cast(T, self.returned)


def attempt(book: Book, change: Callable[[Book], T]) -> TransactionResult[T]:
    """Do what is due by itself, then the change. A change that raises undoes nothing of what was due."""
    book.tick()
    try:
        returned = change(book)
    except VecmillError as error:
        return TransactionResult(book.ledger(), book.now, refusal=error)
    return TransactionResult(book.ledger(), book.now, returned)
