"""Deleting what nobody can ask for any more."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from vecmill.batches.files import DAY, FileStore
from vecmill.batches.record import BatchRecord
from vecmill.batches.store import BatchStore
from vecmill.core.clock import Clock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sweep:
    """For any thread. Several servers may do it at the same time."""

    store: BatchStore
    files: FileStore
    clock: Clock
    keep_days: float
    """After which a batch that has ended is forgotten."""

    def __call__(self) -> None:
        """Delete expired files, what uploads that broke off left, and batches that ended long ago."""
        try:
            # In this order: a file gets its id in a batch's record before it gets its name.
            orphans = self.files.orphans()
            records = self.store.all()
            in_use = {file_id for record in records if not record.ended for file_id in files_of(record)}
            self.files.sweep(orphans, in_use)
            self.store.sweep()
            for record in records:
                if record.ended and record.updated_at + self.keep_days * DAY <= self.clock():
                    self.store.forget(record.id)
        except OSError as error:
            logger.warning("files that have expired cannot be deleted: %s", error)


def files_of(record: BatchRecord) -> list[str]:
    """The ids of all files that a batch reads or gives."""
    return [one for one in (record.input_file_id, record.output_file_id, record.error_file_id) if one]
