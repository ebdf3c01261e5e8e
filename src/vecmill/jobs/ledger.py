"""All jobs at one moment, as bytes and back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import orjson
from pydantic import TypeAdapter, ValidationError

from vecmill.core.errors import JobNotFound
from vecmill.core.protocols import JobChanges, StoredJobs
from vecmill.core.types import Viewer
from vecmill.jobs.job import Job
from vecmill.jobs.pace import Pace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Totals:
    """What concerns all jobs."""

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
    """Never changed; a change makes another."""

    open: Mapping[str, Job] = field(default_factory=dict)
    """Queued and active, in order of registration."""
    ended: Mapping[str, Job] = field(default_factory=dict)
    """In order of ending."""
    totals: Totals = field(default_factory=Totals)

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
        """No time in it is later, save those of leases."""
        times = [self.totals.time]
        for job in (*self.open.values(), *self.ended.values()):
            times += [job.created_at, job.counted_at or 0.0, job.completed_at or 0.0]
        return max(times)


_JOB = TypeAdapter(Job)
_TOTALS = TypeAdapter(Totals)


def ledger_of(open_jobs: Iterable[Job], ended: Iterable[Job], totals: Totals) -> Ledger:
    """In order, whatever order they come in."""
    return Ledger(
        {job.id: job for job in sorted(open_jobs, key=lambda job: job.number)},
        {job.id: job for job in sorted(ended, key=lambda job: job.ended_number)},
        totals,
    )


def decode_job(record: bytes) -> Job | None:
    """None where it is no job: one that cannot be read is lost, the others are not."""
    try:
        return _JOB.validate_json(record)
    except ValidationError:
        logger.error("a stored job cannot be read: it is left out")
        return None


def decode_totals(meta: bytes | None) -> Totals | None:
    """None where there are none that can be read."""
    if meta is None:
        return None
    try:
        return _TOTALS.validate_json(meta)
    except ValidationError:
        logger.error("the stored totals of the jobs cannot be read: they are counted anew")
        return None


def decode(stored: StoredJobs) -> Ledger:
    """All that can be read of what is stored."""
    jobs = [job for record in stored.open.values() if (job := decode_job(record)) is not None]
    ended = [job for record in stored.ended if (job := decode_job(record)) is not None]
    highest = max((max(job.number, job.ended_number) for job in (*jobs, *ended)), default=0)
    totals = decode_totals(stored.meta) or Totals()
    return ledger_of(jobs, ended, replace(totals, sequence=max(totals.sequence, highest)))


def changes(old: Ledger | None, new: Ledger, *, leases: bool, always: bool = False) -> JobChanges | None:
    """What to write so that what was `old` (None: unknown) is `new`; None: nothing.

    Without `leases` their renewal alone is not worth writing. `always`: write the totals even so.
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
    """The jobs of two ledgers that do not know of each other, one after the other."""
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
