"""How many bytes the files of batches take, against the most that they may."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from threading import Lock
from time import monotonic

from vecmill.core.errors import FilesFull

FRESH_SECONDS = 1.0


class Room:
    """Bytes of all files below some folders. Other servers may write there too, so it is looked up again and again."""

    def __init__(self, folders: Sequence[Path], max_bytes: int) -> None:
        self._folders = folders
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._used = 0
        self._looked = -inf

    def take(self, size: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            FilesFull: they would be too many.
        """
        with self._lock:
            if monotonic() - self._looked >= FRESH_SECONDS:
                self._used = sum(map(_size, self._folders))
                self._looked = monotonic()
            if self._used + size > self._max_bytes:
                raise FilesFull(
                    f"The files of batches take {self._used} bytes, {self._max_bytes} are possible (MAX_FILES_BYTES): "
                    f"delete files that are not needed any more (DELETE /v1/files/...), or raise the limit."
                )
            self._used += size

    def forget(self) -> None:
        """Look again the next time: something was deleted."""
        self._looked = -inf


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; what is deleted meanwhile takes none."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                inside = entry.is_dir(follow_symlinks=False)
                total += _size(Path(entry.path)) if inside else entry.stat(follow_symlinks=False).st_size
    return total
