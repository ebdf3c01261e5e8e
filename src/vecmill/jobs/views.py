"""What clients are told of a ledger."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from vecmill.config import JobSettings
from vecmill.core.types import EVERYONE, Viewer
from vecmill.jobs.job import Job, View
from vecmill.jobs.ledger import Ledger
from vecmill.jobs.transitions import JobStatus

ENDED_SHOWN = 10


class Views:
    """A ledger as JSON, at one moment."""

    def __init__(self, ledger: Ledger, settings: JobSettings, now: float) -> None:
        self.ledger = ledger
        self._settings = settings
        self.now = now
        self._places: dict[str, tuple[int, int]] = {}
        position = ahead = 0
        for job in ledger.open.values():
            if job.status is JobStatus.QUEUED:
                position += 1
                self._places[job.id] = (position, ahead)
            ahead += job.remaining

    def position(self, job: Job) -> int:
        """0 while active or ended, else its place among those that wait, from 1."""
        return self._places.get(job.id, (0, 0))[0]

    def one(self, job_id: str, viewer: Viewer = EVERYONE) -> View:
        """A job with its place in the queue while it waits. Raises JobNotFound."""
        return self.of(self.ledger.find(job_id, viewer))

    def of(self, job: Job) -> View:
        """The same of a job at hand."""
        position, ahead = self._places.get(job.id, (0, 0))
        shown = job.view(self.now) | {"position": position, "queue_position": position}
        if job.status is JobStatus.QUEUED:
            shown |= {"chunks_ahead": ahead, "estimated_wait": self._wait(job, ahead)}
        return shown

    def overview(self, limit: int, state: JobStatus | None, project: str | None, viewer: Viewer = EVERYONE) -> View:
        """All of `GET /jobs`: the viewer's jobs, and how busy the queue is, whoever's jobs are in it."""
        rate = self.ledger.totals.pace.rate
        open_jobs, ended = self.ledger.open.values(), reversed(list(self.ledger.ended.values()))

        def of(jobs: Iterable[Job], *states: JobStatus) -> Iterable[View]:
            shown = states if state is None else {state}.intersection(states)
            mine = (job for job in jobs if self.ledger.shows(job, viewer))
            return (self.of(job) for job in mine if job.status in shown and project in (None, job.project))

        return {
            "active": list(of(open_jobs, JobStatus.ACTIVE)),
            "queued": list(of(open_jobs, JobStatus.QUEUED)),
            "recent": list(islice(of(ended, JobStatus.COMPLETED, JobStatus.FAILED), limit)),
            "workers": {
                "max": self._settings.jobs_max_active,
                "busy": sum(job.status is JobStatus.ACTIVE for job in open_jobs),
            },
            "historical_rate": None if rate is None else round(rate, 3),
        }

    def _wait(self, job: Job, ahead: int) -> float | None:
        """Seconds; no more than until it is activated beside the others. None while no pace is known."""
        rate = self.ledger.totals.pace.rate
        if rate is None:
            return None
        left = job.created_at + self._settings.jobs_max_wait_seconds - self.now
        return round(max(0.0, min(ahead / rate, left)), 1)
