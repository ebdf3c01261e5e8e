"""The record of a batch, as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class BatchStatus(StrEnum):
    """OpenAI's."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


class LineError(BaseModel):
    """Why a batch cannot be run."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchProgress(BaseModel):
    """How far a batch is: what comes before these offsets is done and on disk, what comes after does not count."""

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
    """The client that created it, in whose turns its lines run."""

    status: BatchStatus = BatchStatus.VALIDATING
    ends_as: BatchStatus | None = None
    """The final status, decided; `status` follows once the result files are in place."""
    errors: tuple[LineError, ...] = ()
    total: int = 0
    """Lines of the input."""
    first_offset: int = 0
    """Where the first line begins."""
    progress: BatchProgress = BatchProgress()
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
        """Whether the record will not change any more."""
        return self.status in ENDED

    @property
    def file_ids(self) -> list[str]:
        """The ids of all files that the batch reads or writes."""
        return [file_id for file_id in (self.input_file_id, self.output_file_id, self.error_file_id) if file_id]


class WorkNote(BaseModel):
    """Which lines are being run. It exists only meanwhile: found later, it says what a process died on."""

    model_config = ConfigDict(frozen=True)

    first: int
    """The first line that was not recorded as answered when this was written."""
    lines: int
    """How many may have been started: from `first` on if `alone`, else from where the record is."""
    alone: bool
    """The first line was run alone, with nothing else of any batch."""

    def last(self, answered: int) -> int:
        """The last line that may have been started, if `answered` lines are recorded as answered."""
        return self.first - 1 + self.lines if self.alone else answered + self.lines

    def convicts(self, answered: int) -> bool:
        """Whether the next line is the one that was run alone."""
        return self.alone and answered == self.first - 1
