"""Small files that are read either as they were or as they are to be, whenever the writer dies; and locks on files.

A path whose name is used once, such as an id or a temporary name, is a string and not a Path: pathlib interns every
name that it parses, and Python 3.12 never frees an interned string.

Sources: https://man7.org/linux/man-pages/man2/flock.2.html, https://man7.org/linux/man-pages/man5/nfs.5.html
(`local_lock`) and https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Self

TEMPORARY = ".tmp"
PRIVATE = 0o600
LONGEST_WRITE_SECONDS = 3600.0


def write_atomically(path: str | Path, data: bytes) -> None:
    """Put the data in the file's place, on disk before it can be seen. Of several writers the last one wins.

    What a kill leaves behind ends with TEMPORARY.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    temporary = f"{path}.{secrets.token_hex(4)}{TEMPORARY}"
    try:
        with open(temporary, "wb", opener=_private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _private(path: str, flags: int) -> int:
    """Texts, vectors and projects are nobody else's, whatever the folder's rights are."""
    return os.open(path, flags | os.O_CLOEXEC, PRIVATE)


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a file. Waits for nobody: a pipe in its place is no file.

    Raises:
        OSError: it is not there, is no file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is no file", str(path))
        return file.read(size)


def read_whole(path: str | Path) -> bytes:
    """What is in a file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read()


def delete(path: str) -> None:
    """Delete a file; one that is not there is no error. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def delete_unfinished(folder: Path, within: str = "") -> None:
    """Delete what writers that were killed have left in a folder, or in the folders `within` it (a glob).

    Raises:
        OSError: it cannot be read or written.
    """
    for path in folder.glob(f"{within}*{TEMPORARY}"):
        with suppress(FileNotFoundError):
            if abs(time() - path.stat().st_mtime) > LONGEST_WRITE_SECONDS:
                path.unlink()


def sync_folder(path: str | Path) -> None:
    """Have the names in a folder survive the death of the machine, too.

    Raises:
        OSError: it is not there, or the disk failed.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


NETWORK_TYPES = ("nfs", "nfs4")
LOCAL_LOCKS = {"local_lock=all", "local_lock=flock", "nolock"}


def unshared_locks(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Why locks on files below a path are not seen by other machines that have the same files; None if they are.

    It ends a sentence that begins with the path's name. What cannot be found out is taken to be right.
    """
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        return None
    best: tuple[int, str, set[str]] = (-1, "", set())
    for line in lines:
        before, _, after = line.partition(" - ")
        point, (kind, _, options) = Path(_unescaped(before.split()[4])), (*after.split(), "", "", "")[:3]
        if (path == point or point in path.parents) and len(point.parts) >= best[0]:
            best = len(point.parts), kind, {*options.split(",")}
    _, kind, found = best
    if kind not in NETWORK_TYPES or not (local := found & LOCAL_LOCKS):
        return None
    return (
        f"is on NFS mounted with `{min(local)}`, so that two servers would run the same batch: mount it with "
        f"`local_lock=none` (NFS 4 locks by itself)."
    )


def _unescaped(point: str) -> str:
    """A mount point as mountinfo writes it: spaces, tabs, newlines and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)


class FileLock:
    """A held lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: str | Path, *, create: bool = False, shared: bool = False) -> Self | None:
        """Lock a file; None if it is locked already, in this process or another, or does not exist.

        `shared`: the lock may be held together with other shared ones.

        Raises:
            OSError: it cannot be opened.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), PRIVATE)
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

    def sign(self, name: bytes) -> None:
        """Write who holds it into the file.

        Raises:
            OSError: it cannot be written.
        """
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, name, 0)
        os.fsync(self._descriptor)

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()
