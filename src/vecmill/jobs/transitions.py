"""The states of a job and what may happen in each: one table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

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
