"""The folder of batches: `<id>/batch.json`, its `lock`, `cancel` and `working`, and what it has answered so far."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from time import time

from pydantic import ValidationError

from vecmill.batches.record import BatchRecord, WorkNote
from vecmill.core.errors import NoSuchBatch
from vecmill.core.types import EVERYONE, Viewer
from vecmill.storage.files import FileLock, delete_unfinished, sync_folder, write_atomically

logger = logging.getLogger(__name__)

BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
RECORD, LOCK, CANCEL, WORKING = "batch.json", "lock", "cancel", "working"
UNBORN = "new."
UNBORN_SECONDS = 3600.0


class BatchStore:
    """Reads and writes records. For any thread; every call may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended: dict[str, BatchRecord] = {}
        self._broken: set[str] = set()

    @staticmethod
    def new_id() -> str:
        """An id that no batch has."""
        return f"batch_{secrets.token_hex(16)}"

    def folder(self, batch_id: str) -> Path:
        """Where all of a batch is."""
        return self._folder / batch_id

    def create(self, record: BatchRecord) -> None:
        """Keep a new batch; all of it or nothing."""
        unborn = self.folder(UNBORN + record.id)
        try:
            unborn.mkdir(mode=0o700)
            (unborn / LOCK).touch(mode=0o600)
            write_atomically(unborn / RECORD, _serialised(record))
            sync_folder(unborn)
            unborn.rename(self.folder(record.id))
            sync_folder(self._folder)
        except OSError:
            shutil.rmtree(unborn, ignore_errors=True)
            raise

    def save(self, record: BatchRecord) -> None:
        """Replace a record. For whoever holds the batch's lock."""
        write_atomically(self.folder(record.id) / RECORD, _serialised(record))

    def get(self, batch_id: str, viewer: Viewer = EVERYONE) -> BatchRecord:
        """A batch of the viewer.

        Raises:
            NoSuchBatch: there is none of this id, whatever the id looks like, its record cannot be read, or it is
                somebody else's.
        """
        record = self._read(batch_id) if BATCH_ID.fullmatch(batch_id) else None
        if record is None or not viewer.sees(record.owner):
            raise _none_of(batch_id)
        return record

    def all(self) -> list[BatchRecord]:
        """All batches, the oldest first."""
        names = (name for name in os.listdir(self._folder) if BATCH_ID.fullmatch(name))
        records = [record for name in names if (record := self._read(name)) is not None]
        return sorted(records, key=lambda record: (record.created_at, record.id))

    def lock(self, batch_id: str) -> FileLock | None:
        """The right to run a batch; None where somebody has it."""
        return FileLock.take(self.folder(batch_id) / LOCK)

    def cancel(self, batch_id: str, now: float) -> None:
        """Ask whoever runs the batch to cancel it.

        Raises:
            NoSuchBatch: it was deleted meanwhile.
        """
        if self.cancel_asked(batch_id) is not None:
            return
        try:
            write_atomically(self.folder(batch_id) / CANCEL, repr(now).encode())
        except FileNotFoundError:
            raise _none_of(batch_id) from None

    def cancel_asked(self, batch_id: str) -> float | None:
        """When the batch was asked to be cancelled; None: it was not."""
        try:
            return float((self.folder(batch_id) / CANCEL).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def note_work(self, batch_id: str, note: WorkNote) -> None:
        """Have it on disk what is about to be worked on. For whoever holds the batch's lock, as the next two."""
        write_atomically(self.folder(batch_id) / WORKING, note.model_dump_json().encode())

    def noted_work(self, batch_id: str) -> WorkNote | None:
        """What a process worked on when it died; None: none did."""
        try:
            return WorkNote.model_validate_json((self.folder(batch_id) / WORKING).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def end_work(self, batch_id: str) -> None:
        """Nothing is being worked on any more."""
        (self.folder(batch_id) / WORKING).unlink(missing_ok=True)

    def forget(self, batch_id: str) -> None:
        """Delete a batch with all that is its own."""
        self._ended.pop(batch_id, None)
        shutil.rmtree(self.folder(batch_id), ignore_errors=True)

    def sweep(self) -> None:
        """Delete what is left of writes that were cut short, by a kill."""
        delete_unfinished(self._folder, "batch_*/")
        for path in self._folder.glob(UNBORN + "*"):
            if abs(time() - path.stat().st_mtime) > UNBORN_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, batch_id: str) -> BatchRecord | None:
        """None where it is gone or broken. What has ended does not change and is not read again."""
        path = self.folder(batch_id) / RECORD
        try:
            if (known := self._ended.get(batch_id)) is not None:  # another thread may forget it meanwhile
                path.stat()
                return known
            record = BatchRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            self._ended.pop(batch_id, None)
            return None
        except ValidationError as error:
            if batch_id not in self._broken:
                logger.error("%s cannot be read (%d faults): this batch is left out", path, error.error_count())
            self._broken.add(batch_id)
            return None
        if record.ended:
            self._ended[batch_id] = record
        return record


def _none_of(batch_id: str) -> NoSuchBatch:
    return NoSuchBatch(f"There is no batch {batch_id[:100]!r}.")


def _serialised(record: BatchRecord) -> bytes:
    return record.model_dump_json().encode()
