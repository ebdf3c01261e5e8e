"""A file as it comes in, piece by piece."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

from vecmill.batches.files import FileStore, StoredFile
from vecmill.core.errors import BodyTooLarge


class Upload:
    """A file that is not whole yet. For any thread, one at a time; every call may raise OSError."""

    def __init__(self, files: FileStore, max_bytes: int, owner: str | None = None) -> None:
        self._files = files
        self._owner = owner
        self._max_bytes = max_bytes
        self._id = files.new_id()
        self._path = files.part(self._id)
        self._file = _opened(self._path)
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            BodyTooLarge: the file is too large. FilesFull: all files together are.
        """
        if self.size + len(data) > self._max_bytes:
            raise too_large(self._max_bytes)
        self._files.room.take(len(data))
        self._file.write(data)
        self.size += len(data)

    def finish(self, filename: str, expires_seconds: float | None) -> StoredFile:
        """Make it a file of its own, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        file = self._files.add(
            self._id,
            self._path,
            self.size,
            filename=filename,
            purpose="batch",
            expires_seconds=expires_seconds,
            owner=self._owner,
        )
        self._file.close()
        return file

    def discard(self) -> None:
        """Leave nothing behind, unless it is finished. Raises nothing."""
        if self._file.closed:
            return
        for path in (self._path, self._files.data(self._id)):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # what is still to be flushed may not fit
            self._file.close()
        self._files.room.forget()


def _opened(path: Path) -> BufferedWriter:
    """A new file with a lock on it until it is closed: what nobody holds and has no metadata is deleted."""
    while True:
        file = path.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # it was deleted before it was locked


def too_large(max_bytes: int) -> BodyTooLarge:
    """What an upload above the limit is refused with."""
    return BodyTooLarge(
        f"The file is larger than {max_bytes} bytes (MAX_FILE_BYTES): split it into several, each with a batch of its "
        f"own."
    )
