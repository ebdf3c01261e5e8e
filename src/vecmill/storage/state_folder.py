"""The folder of one server's state, and the lock that keeps a second server out of it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Self

from vecmill.core.errors import StartupError
from vecmill.storage.file_lock import FileLock

logger = logging.getLogger(__name__)


class StateFolder:
    """An open folder. The lock goes with the process, however that ends."""

    def __init__(self, path: Path, lock: FileLock | None, problem: str | None) -> None:
        self.path = path
        self.problem = problem
        """Why nothing can be kept in it, as a sentence; None where everything can."""
        self._lock = lock

    @classmethod
    def open(cls, path: Path, *, shared: bool = False) -> Self:
        """Make the folder if need be, readable by its owner alone, and hold it until `close`.

        One that cannot be written is no reason not to serve: `problem` says so then. `shared`: together with other
        servers that say the same.

        Raises:
            StartupError: another server holds it.
        """
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=path):
                pass
            lock = FileLock.take(path / "lock", create=True, shared=shared)
        except OSError as error:
            problem = f"STATE_DIR={path} cannot be written ({error.strerror}): nothing outlives this process."
            logger.error(problem)
            return cls(path, None, problem)
        if lock is None:
            raise StartupError(
                f"STATE_DIR={path} is in use by another vecmill server: stop it, give this one a STATE_DIR of its own, "
                f"or set REDIS_URL for both so that they share their state."
            )
        return cls(path, lock, None)

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()
