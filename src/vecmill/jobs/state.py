"""The rules of the queue: order, places, leases, waits. Sees one moment, waits for nothing, keeps nothing."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from typing import Any

from vecmill.config import JobSettings
from vecmill.core.errors import InvalidInput, Overloaded
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import Job
from vecmill.jobs.ledger import Ledger
from vecmill.jobs.transitions import JobEvent, JobStatus, after

logger = logging.getLogger(__name__)

ENDED_KEPT = 1000
# More open jobs than any office has editors; a client that registers without end must not fill the memory.
OPEN_JOBS_MAX = 1000
# Seconds that count 1/e of the present, for the pace of one job and for that of all.
JOB_PACE_SECONDS = 30.0
TOTAL_PACE_SECONDS = 60.0


class Book:
    """A working copy of a ledger. Made anew for each transaction, which may be tried several times."""

    def __init__(self, ledger: Ledger, settings: JobSettings, now: float) -> None:
        self.now = now
        self._settings = settings
        self._open = dict(ledger.open)
        self._ended = dict(ledger.ended)
        self._totals = ledger.totals

    def ledger(self) -> Ledger:
        """What it has become."""
        return Ledger(self._open, self._ended, replace(self._totals, time=self.now))

    def tick(self) -> None:
        """What is due by itself: give up jobs whose lease has run out, then fill the places."""
        silent = f"abandoned: no sign from its client for {self._settings.job_lease_seconds:g} seconds"
        for job in [job for job in self._open.values() if job.lease_until < self.now]:
            self._end(job, JobEvent.ABANDON, silent)
        self._fill()

    def resume(self) -> None:
        """After a time in which nobody could report: every open job gets a full lease.

        How long its client worked in that time is not known, so that its next report counts for no pace.
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
        """A sign of life. Raises JobNotFound."""
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
        """Forget the jobs that have ended, or show the viewer's no more; how many they were."""
        ledger = self.ledger()
        shown = sum(ledger.shows(job, viewer) for job in self._ended.values())
        if viewer.everything:
            self._forget(len(self._ended))
        elif shown:
            latest = next(reversed(self._ended.values())).ended_number
            # Those of keys that are gone need no mention once their jobs are.
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
        """The job with its progress, which counts into its own pace and that of all."""
        if job.counted_at is None:
            return replace(job, current=current, counted_at=self.now)
        done = max(0, current - job.current)
        totals = self._totals
        # A silence longer than the pace looks back says nothing of how fast the machine is.
        since = min(self.now - totals.counted_at, TOTAL_PACE_SECONDS)
        self._totals = replace(totals, pace=totals.pace.plus(done, since, TOTAL_PACE_SECONDS), counted_at=self.now)
        pace = job.pace.plus(done, self.now - job.counted_at, JOB_PACE_SECONDS)
        return replace(job, current=current, pace=pace, counted_at=self.now)

    def _fill(self) -> None:
        """First come first served while there are places; who has waited too long begins without one."""
        queued = [job for job in self._open.values() if job.status is JobStatus.QUEUED]
        active = len(self._open) - len(queued)
        for job in queued:
            if active >= self._settings.jobs_max_active and not self._waited(job):
                return
            if active == 0:  # an idle time is nobody's pace
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
