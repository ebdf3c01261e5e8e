"""The folder of one server's state, and the lock that keeps a second server out of it; or one that servers share."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Self

from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.storage.files import FileLock, unshared_locks
from vecmill.storage.formats import newer_state, stamp

logger = logging.getLogger(__name__)

LOCK = "lock"
LEAST_FREE_BYTES = 65_536  # with less, neither jobs nor vectors can be written


class StateFolder:
    """An open folder. The lock goes with the process, however that ends."""

    def __init__(
        self,
        path: Path,
        lock: FileLock | None,
        problem: str | None,
        setting: str = "STATE_DIR",
        *,
        shared: bool = False,
    ) -> None:
        self.path = path
        self.setting = setting
        """The setting that names it."""
        self.problem = problem
        """Why nothing can be kept in it, as a sentence, as last looked at; None where everything can."""
        self._shared = shared
        self._lock = lock
        self._opened = None if lock is None else path.stat()

    @classmethod
    def open(cls, path: Path, *, shared: bool = False, setting: str = "STATE_DIR") -> Self:
        """Make the folder if need be, readable by its owner alone, and hold it until `close`.

        A folder that cannot be written does not stop the server: `problem` then says why. `shared`: other servers may
        hold it too, if they also open it as shared.

        Raises:
            StartupObstacle: another server holds it. StartupError: a newer version has written it, or it is BATCH_DIR,
                where locks are not shared.
        """
        if shared and (trouble := unshared_locks(path)) is not None:
            if setting == "BATCH_DIR":
                raise StartupError(f"{setting}={path} {trouble}")
            logger.warning("%s=%s %s Or let no other machine use it.", setting, path, trouble)
        try:
            lock = _made_and_locked(path, shared=shared)
            if lock is not None:
                cls._check_format(path, lock, setting)
        except OSError as error:
            lost = "nothing outlives this process" if setting == "STATE_DIR" else "it keeps nothing"
            problem = f"{setting}={path} cannot be written ({error.strerror}): {lost}."
            logger.error(problem)
            return cls(path, None, problem, setting, shared=shared)
        if lock is None:
            raise StartupObstacle(
                f"{setting}={path} is in use by another vecmill server: stop it, give this one a {setting} of its own, "
                f"or set REDIS_URL for both so that they share their state."
            )
        return cls(path, lock, None, setting, shared=shared)

    @staticmethod
    def _check_format(path: Path, lock: FileLock, setting: str) -> None:
        """Raises StartupError where a newer version has written it, and OSError."""
        try:
            if (newer := newer_state(path, setting)) is not None:
                raise StartupError(newer)
            stamp(path)
        except (StartupError, OSError):
            lock.release()
            raise

    def file(self, name: str) -> Path | None:
        """Where a file of this server is kept; None where nothing can be kept."""
        return None if self.problem is not None else self.path / name

    def look(self) -> bool:
        """Find out what has become of the folder since; it may wait for the disk. True: it is another one now.

        Where it was removed, or replaced by another, the one at its path is made and held as at the start; what was in
        the old one is not in it.
        """
        if self._opened is None:
            return False
        before, trouble = self._opened, self._found(self._opened)
        problem = None if trouble is None else f"{self.setting}={self.path} {trouble}."
        if problem is not None and self.problem is None:
            logger.error(problem)
        elif problem is None and self.problem is not None:
            logger.warning("%s=%s can be used again", self.setting, self.path)
        self.problem = problem
        return self._opened is not before

    def _found(self, opened: os.stat_result) -> str | None:
        try:
            there = (self.path / LOCK).exists()  # it goes with all else where somebody empties the folder
            if not there or not os.path.samestat(opened, self.path.stat()):
                what = "was replaced by another folder" if there else "was removed or emptied"
                if (why_not := self._begin_anew(what)) is not None:
                    return f"{what}, {why_not}"
            disk = os.statvfs(self.path)
        except OSError as error:
            return f"was removed or cannot be used ({error.strerror}): what is kept now does not outlive this process"
        if disk.f_flag & os.ST_RDONLY:
            return "cannot be written (Read-only file system)"
        return "is on a disk that is full: make room there" if _is_full(disk) else None

    def _begin_anew(self, what: str) -> str | None:
        """Why the folder that is at the path now cannot be used; None where it is, from now on. Raises OSError."""
        lock = _made_and_locked(self.path, shared=self._shared)
        if lock is None:
            return "which another vecmill server uses: stop that one, or restart this one"
        try:
            self._check_format(self.path, lock, self.setting)
        except StartupError:
            return "which a newer version of vecmill has written: restart the server, which then says what to do"
        self._opened, old, self._lock = self.path.stat(), self._lock, lock
        if old is not None:
            old.release()
        logger.error("%s=%s %s: the server goes on with the one that is there now", self.setting, self.path, what)
        return None

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()


def _made_and_locked(path: Path, *, shared: bool) -> FileLock | None:
    """The lock of a folder, which is made if need be; None where another server has it.

    Raises:
        OSError: it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=path):
        pass
    return FileLock.take(path / LOCK, create=True, shared=shared)


def _is_full(disk: os.statvfs_result) -> bool:
    """Whether there is no room for data or for new files. Some file systems count neither, and say 0 of 0."""
    free = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail  # what is kept for root
    return bool((disk.f_blocks and free * disk.f_frsize < LEAST_FREE_BYTES) or (disk.f_files and not disk.f_favail))
