"""Small files that are read either as they were or as they are to be, whenever the writer dies."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from time import time

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
