"""One indexing job: its states and what may happen in each, its pace, and what a client is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import exp
from typing import Any

from vecmill.core.errors import JobConflict


class JobStatus(StrEnum):
    """The four that the clients know; a cancelled or abandoned job is `failed`."""

    QUEUED = "queued"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (JobStatus.COMPLETED, JobStatus.FAILED)


class JobEvent(StrEnum):
    """What happens to a job: `activate` and `abandon` by the server, the others by its client or another."""

    ACTIVATE = "activate"
    PROGRESS = "progress"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"
    ABANDON = "abandon"


# What is not here is a conflict. A client may work while its job still waits: it gave up waiting, or never asked.
TRANSITIONS: Mapping[JobStatus, Mapping[JobEvent, JobStatus]] = {
    JobStatus.QUEUED: {
        JobEvent.ACTIVATE: JobStatus.ACTIVE,
        JobEvent.PROGRESS: JobStatus.QUEUED,
        JobEvent.COMPLETE: JobStatus.COMPLETED,
        JobEvent.FAIL: JobStatus.FAILED,
        JobEvent.CANCEL: JobStatus.FAILED,
        JobEvent.ABANDON: JobStatus.FAILED,
    },
    JobStatus.ACTIVE: {
        JobEvent.PROGRESS: JobStatus.ACTIVE,
        JobEvent.COMPLETE: JobStatus.COMPLETED,
        JobEvent.FAIL: JobStatus.FAILED,
        JobEvent.CANCEL: JobStatus.FAILED,
        JobEvent.ABANDON: JobStatus.FAILED,
    },
    JobStatus.COMPLETED: {},
    JobStatus.FAILED: {},
}


def after(job_id: str, status: JobStatus, event: JobEvent) -> JobStatus:
    """The state that an event leads to.

    Raises:
        JobConflict: the present state does not allow it.
    """
    try:
        return TRANSITIONS[status][event]
    except KeyError:
        already = " already" if status.ended or event is JobEvent.ACTIVATE else ""
        raise JobConflict(
            f"Job {job_id} is {status.value}{already}: `{event.value}` is not possible.", param="job_id"
        ) from None


@dataclass(frozen=True, slots=True)
class Pace:
    """A mean over time, weighted exponentially: what lies one time constant back counts 1/e of what is now."""

    chunks: float = 0.0
    seconds: float = 0.0

    def plus(self, chunks: float, seconds: float, constant: float) -> Pace:
        """The pace after a report of `chunks` done in the last `seconds`; `constant`: the time constant, in seconds."""
        if seconds <= 0:
            return Pace(self.chunks + chunks, self.seconds)
        faded = exp(-seconds / constant)
        # The integral of the weights over the new seconds, during which the chunks are taken to have come evenly.
        new = constant * (1 - faded)
        return Pace(self.chunks * faded + chunks / seconds * new, self.seconds * faded + new)

    @property
    def rate(self) -> float | None:
        """Chunks per second; None before the first were done."""
        return self.chunks / self.seconds if self.chunks > 0 and self.seconds > 0 else None


View = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was at one moment; a change makes another. Times are Unix seconds by the queue's clock."""

    id: str
    number: int
    """Order of registration."""
    project: str
    total_chunks: int
    instance_id: str
    created_at: float
    lease_until: float
    counted_at: float | None
    """When `pace` was last updated; None: the next report does not count towards it."""
    version: int = 1
    """Increases with every change except a renewed lease."""
    current: int = 0
    status: JobStatus = JobStatus.QUEUED
    started_at: float | None = None
    completed_at: float | None = None
    error: str | None = None
    ended_number: int = 0
    """Order of ending, in the same count as `number`; 0 while open."""
    owner: str | None = None
    """The key that registered it; None: there were no keys, or it was before jobs had owners."""
    pace: Pace = field(default_factory=Pace)

    @property
    def remaining(self) -> int:
        """Chunks still to come."""
        return max(0, self.total_chunks - self.current)

    def view(self, now: float) -> View:
        """The job as JSON. Fields that do not apply yet are absent, as the clients expect."""
        shown: View = {
            "id": self.id,
            "project": self.project,
            "total_chunks": self.total_chunks,
            "instance_id": self.instance_id,
            "current": self.current,
            "status": self.status.value,
            "created_at": self.created_at,
        }
        if self.started_at is not None:
            shown |= self._timing(self.started_at, now)
        if self.completed_at is not None:
            started = self.started_at if self.started_at is not None else self.created_at
            shown |= {
                "completed_at": self.completed_at,
                "duration_seconds": round(max(0.0, self.completed_at - started), 3),
            }
        if self.error is not None:
            shown["error"] = self.error
        return shown

    def _timing(self, started_at: float, now: float) -> View:
        elapsed = max(0.0, (self.completed_at or now) - started_at)
        mean = self.current / elapsed if elapsed > 0 else None
        lately = self.pace.rate or mean
        eta = self.remaining / lately if lately and not self.status.ended else None
        return {
            "started_at": started_at,
            "elapsed_seconds": round(elapsed, 3),
            "chunks_per_second": None if mean is None else round(mean, 3),
            "eta_seconds": None if eta is None else round(eta, 1),
            "percent": round(100 * self.current / self.total_chunks, 1) if self.total_chunks else 100.0,
        }
