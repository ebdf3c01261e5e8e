"""What is known of a batch, as it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Status(StrEnum):
    """OpenAI's."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})


class LineError(BaseModel):
    """Why a batch cannot be run."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Progress(BaseModel):
    """How far a batch is: what is before these places is done and on disk, what is after them does not count."""

    model_config = ConfigDict(frozen=True)

    input_offset: int = 0
    lines: int = 0
    """Of the input, answered or failed."""
    output_bytes: int = 0
    error_bytes: int = 0
    completed: int = 0
    failed: int = 0
    tokens: int = 0
    cached_tokens: int = 0


class BatchRecord(BaseModel):
    """A batch. Times are Unix times in seconds."""

    model_config = ConfigDict(frozen=True)

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    metadata: Mapping[str, str] | None = None
    output_expires_seconds: float | None = None
    owner: str | None = None
    """The key that created it; None: there were no keys, or it was before batches had owners."""
    client: str = "batches"
    """In whose turns its lines are run: the client's that created it."""

    status: Status = Status.VALIDATING
    ends_as: Status | None = None
    """What it will be once its files are in place; decided for good."""
    errors: tuple[LineError, ...] = ()
    total: int = 0
    """Lines of the input."""
    first_offset: int = 0
    """Where the first line begins."""
    progress: Progress = Progress()
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None

    updated_at: float = 0.0
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.status in ENDED


class WorkNote(BaseModel):
    """Which lines are being worked on. It is there only meanwhile: found later, it says on what a process died."""

    model_config = ConfigDict(frozen=True)

    first: int
    """The first line that was not recorded as answered when this was written."""
    lines: int
    """So many may have been begun with: from `first` on if alone, else from wherever the record is."""
    alone: bool
    """The first was worked on by itself, and nothing else of any batch."""

    def last(self, answered: int) -> int:
        """The last line that may have been begun with, where so many lines are recorded as answered."""
        return self.first - 1 + self.lines if self.alone else answered + self.lines

    def convicts(self, answered: int) -> bool:
        """Whether the next line is the one that was worked on by itself."""
        return self.alone and answered == self.first - 1
