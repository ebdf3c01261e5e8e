"""One indexing job and what a client is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vecmill.jobs.pace import Pace
from vecmill.jobs.transitions import JobStatus

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
    """Until when `pace` has counted; None: the next report says nothing of it."""
    version: int = 1
    """Grows with every change but a lease's renewal."""
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
