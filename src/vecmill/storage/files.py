"""Small files that are read either as they were or as they are to be, whenever the writer dies; and locks on files.

Source: https://man7.org/linux/man-pages/man2/flock.2.html"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Self

TEMPORARY = ".tmp"
LONGEST_WRITE_SECONDS = 3600.0


def write_atomically(path: Path, data: bytes) -> None:
    """Put the data in the file's place, on disk before it can be seen. Of several writers the last one wins.

    What a kill leaves behind ends with TEMPORARY.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def delete_unfinished(folder: Path, within: str = "") -> None:
    """Delete what writers that were killed have left in a folder, or in the folders `within` it (a glob).

    Raises:
        OSError: it cannot be read or written.
    """
    for path in folder.glob(f"{within}*{TEMPORARY}"):
        with suppress(FileNotFoundError):
            if abs(time() - path.stat().st_mtime) > LONGEST_WRITE_SECONDS:
                path.unlink()


def sync_folder(path: Path) -> None:
    """Have the names in a folder survive the death of the machine, too.

    Raises:
        OSError: it is not there, or the disk failed.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class FileLock:
    """A held lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, *, create: bool = False, shared: bool = False) -> Self | None:
        """Lock a file; None if it is locked already, in this process or another, or does not exist.

        `shared`: the lock may be held together with other shared ones.

        Raises:
            OSError: it cannot be opened.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()
