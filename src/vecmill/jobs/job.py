"""One indexing job, its states and what a client is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class JobStatus(StrEnum):
    """`queued` → `active` → `completed` or `failed`. The four that the clients know; a cancelled job is `failed`."""

    QUEUED = "queued"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (JobStatus.COMPLETED, JobStatus.FAILED)


@dataclass(slots=True)
class Job:
    """Times are Unix seconds; `lease_until` is on the monotonic clock, so that setting the clock ends no job."""

    id: str
    project: str
    total_chunks: int
    instance_id: str
    created_at: float
    lease_until: float
    current: int = 0
    status: JobStatus = JobStatus.QUEUED
    started_at: float | None = None
    completed_at: float | None = None
    error: str | None = field(default=None)

    @property
    def remaining(self) -> int:
        """Chunks still to come."""
        return max(0, self.total_chunks - self.current)

    def view(self, now: float) -> dict[str, object]:
        """The job as JSON. Fields that do not apply yet are absent, as the clients expect."""
        shown: dict[str, object] = {
            "id": self.id,
            "project": self.project,
            "total_chunks": self.total_chunks,
            "instance_id": self.instance_id,
            "current": self.current,
            "status": self.status.value,
            "created_at": self.created_at,
        }
        if self.started_at is not None:
            shown |= self._pace(self.started_at, now)
        if self.completed_at is not None:
            started = self.started_at if self.started_at is not None else self.created_at
            shown |= {
                "completed_at": self.completed_at,
                "duration_seconds": round(self.completed_at - started, 3),
            }
        if self.error is not None:
            shown["error"] = self.error
        return shown

    def _pace(self, started_at: float, now: float) -> dict[str, object]:
        elapsed = max(0.0, (self.completed_at or now) - started_at)
        rate = self.current / elapsed if elapsed > 0 else None
        eta = self.remaining / rate if rate and not self.status.ended else None
        return {
            "started_at": started_at,
            "elapsed_seconds": round(elapsed, 3),
            "chunks_per_second": None if rate is None else round(rate, 3),
            "eta_seconds": None if eta is None else round(eta, 1),
            "percent": round(100 * self.current / self.total_chunks, 1) if self.total_chunks else 100.0,
        }
