"""The queue of jobs: first come first served, a few active at a time, the abandoned given up."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable
from time import monotonic, time

from vecmill.config import JobSettings
from vecmill.core.errors import InvalidInput, JobConflict, JobNotFound, Overloaded
from vecmill.jobs.job import Job, JobStatus

logger = logging.getLogger(__name__)

ENDED_KEPT = 100
ENDED_SHOWN = 10
# More open jobs than any office has editors; a client that registers without end must not fill the memory.
OPEN_JOBS_MAX = 1000


class JobQueue:
    """All jobs of this process. Every call first gives up jobs whose lease has run out, then fills free places.

    Belongs to the event loop's thread. `clock` is monotonic, `wall` is Unix time.
    """

    def __init__(
        self, settings: JobSettings, clock: Callable[[], float] = monotonic, wall: Callable[[], float] = time
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._wall = wall
        self._open: dict[str, Job] = {}  # queued and active, in order of registration
        self._ended: deque[Job] = deque(maxlen=ENDED_KEPT)
        self._rate: float | None = None

    def register(self, project: str, total_chunks: int, instance_id: str) -> tuple[Job, int]:
        """A new job and its position: 0 is active, 1 the first that waits.

        Raises:
            Overloaded: too many jobs are open.
        """
        self._tick()
        if len(self._open) >= OPEN_JOBS_MAX:
            raise Overloaded(f"The server is temporarily overloaded: {len(self._open)} jobs are open.")
        job = Job(
            id=secrets.token_hex(8),
            project=project,
            total_chunks=total_chunks,
            instance_id=instance_id,
            created_at=self._wall(),
            lease_until=self._lease(),
        )
        self._open[job.id] = job
        self._fill()
        logger.info("job registered", extra={"job": job.id, "chunks": total_chunks, "status": job.status.value})
        return job, self.position(job)

    def get(self, job_id: str) -> Job:
        """The job; asking renews its lease.

        Raises:
            JobNotFound: it never was, or is long ended.
        """
        self._tick()
        job = self._find(job_id)
        self._renew(job)
        return job

    def touch(self, job_id: str) -> None:
        """Renew the lease of a job that tagged other work with its id; unknown ids are let be."""
        if (job := self._open.get(job_id)) is not None:
            self._renew(job)

    def position(self, job: Job) -> int:
        """0 while active or ended, else its place among those that wait, from 1."""
        if job.status is not JobStatus.QUEUED:
            return 0
        return 1 + self._queued().index(job)

    def progress(self, job_id: str, current: int) -> Job:
        """Record how many chunks are done.

        Raises:
            InvalidInput: below zero or above the job's total. JobNotFound, JobConflict.
        """
        job = self._open_job(job_id, "record progress on")
        if not 0 <= current <= job.total_chunks:
            raise InvalidInput(f"`current` is {current}; this job has 0 to {job.total_chunks} chunks.", param="current")
        job.current = current
        self._renew(job)
        return job

    def complete(self, job_id: str) -> Job:
        """The client is done. Raises JobNotFound, JobConflict."""
        job = self._open_job(job_id, "complete")
        job.current = job.total_chunks
        self._end(job, JobStatus.COMPLETED)
        return job

    def fail(self, job_id: str, error: str) -> Job:
        """The client gave up, or somebody cancelled it. Raises JobNotFound, JobConflict."""
        job = self._open_job(job_id, "fail")
        self._end(job, JobStatus.FAILED, error)
        return job

    def clear_ended(self) -> int:
        """Forget the jobs that have ended; how many they were."""
        count = len(self._ended)
        self._ended.clear()
        return count

    def view(self, job: Job) -> dict[str, object]:
        """The job as JSON, with its place in the queue while it waits."""
        shown = job.view(self._wall())
        position = self.position(job)
        shown |= {"position": position, "queue_position": position}
        if job.status is JobStatus.QUEUED:
            ahead = self._chunks_ahead(job)
            shown["chunks_ahead"] = ahead
            shown["estimated_wait"] = None if self._rate is None else round(ahead / self._rate, 1)
        return shown

    def overview(self) -> dict[str, object]:
        """All of `GET /jobs`."""
        self._tick()
        active = self._active()
        return {
            "active": [self.view(job) for job in active],
            "queued": [self.view(job) for job in self._queued()],
            "recent": [self.view(job) for job in list(self._ended)[: -ENDED_SHOWN - 1 : -1]],
            "workers": {"max": self._settings.jobs_max_active, "busy": len(active)},
            "historical_rate": None if self._rate is None else round(self._rate, 3),
        }

    def count(self, status: JobStatus) -> int:
        """How many jobs are in a state."""
        self._tick()
        return sum(job.status is status for job in (*self._open.values(), *self._ended))

    def _active(self) -> list[Job]:
        return [job for job in self._open.values() if job.status is JobStatus.ACTIVE]

    def _queued(self) -> list[Job]:
        return [job for job in self._open.values() if job.status is JobStatus.QUEUED]

    def _chunks_ahead(self, job: Job) -> int:
        """Chunks of all jobs that were registered before it and are still open."""
        ahead = 0
        for other in self._open.values():
            if other is job:
                break
            ahead += other.remaining
        return ahead

    def _find(self, job_id: str) -> Job:
        if job_id in self._open:
            return self._open[job_id]
        for job in self._ended:
            if job.id == job_id:
                return job
        raise JobNotFound(f"There is no job {job_id[:80]!r}; register one with POST /jobs.", param="job_id")

    def _open_job(self, job_id: str, verb: str) -> Job:
        self._tick()
        job = self._find(job_id)
        if job.status.ended:
            raise JobConflict(f"Cannot {verb} job {job.id}: it is {job.status.value} already.", param="job_id")
        return job

    def _lease(self) -> float:
        return self._clock() + self._settings.job_lease_seconds

    def _renew(self, job: Job) -> None:
        job.lease_until = self._lease()

    def _tick(self) -> None:
        now = self._clock()
        for job in [job for job in self._open.values() if job.lease_until < now]:
            silent = f"abandoned: no sign from its client for {self._settings.job_lease_seconds:g} seconds"
            self._end(job, JobStatus.FAILED, silent)
        self._fill()

    def _fill(self) -> None:
        free = self._settings.jobs_max_active - len(self._active())
        for job in self._queued()[: max(0, free)]:
            job.status = JobStatus.ACTIVE
            job.started_at = self._wall()

    def _end(self, job: Job, status: JobStatus, error: str | None = None) -> None:
        del self._open[job.id]
        job.status, job.error, job.completed_at = status, error, self._wall()
        self._ended.append(job)
        if status is JobStatus.COMPLETED and job.started_at is not None and job.completed_at > job.started_at:
            rate = job.total_chunks / (job.completed_at - job.started_at)
            # Half of the new, half of the old: follows the machine without jumping with one small job.
            self._rate = rate if self._rate is None else (rate + self._rate) / 2
        logger.info("job ended", extra={"job": job.id, "status": status.value, "chunks": job.current})
        self._fill()
