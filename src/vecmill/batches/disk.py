"""Disk access of files and batches: off the event loop, within MAX_FILES_BYTES, and what its errors mean to clients."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, ParamSpec, TypeVar

from vecmill.core.errors import FilesFull, InsufficientStorage, ShuttingDown, StateUnavailable
from vecmill.core.threads import LastingThreads

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
RETRY_SECONDS = 5.0  # between tries to write to a disk that fails
FRESH_SECONDS = 1.0  # how old the number of used bytes may be

_THREADS = LastingThreads(16, "batch-disk")
"""Of their own: a disk that hangs keeps them all, and others than files and batches must find threads then."""


def _run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    return asyncio.wrap_future(_THREADS.submit(function, *args, **kwargs))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread; a cancelled caller waits for the function: it may close its files then."""
    running = _run(function, *args, **kwargs)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # mark it as retrieved, or asyncio logs it
        raise


async def on_disk(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread as `in_thread` does; turn its OSError into an error for a client.

    Raises:
        InsufficientStorage: the disk is full. StateUnavailable: any other.
    """
    with _errors_for_clients():
        return await in_thread(function, *args, **kwargs)


async def read_from_disk(read: Callable[[], T]) -> T:
    """As `on_disk`, for what only reads: a cancelled caller does not wait for a disk that hangs.

    Raises:
        InsufficientStorage, StateUnavailable: as there.
    """
    with _errors_for_clients():
        return await _run(read)


@contextmanager
def _errors_for_clients() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise InsufficientStorage from error
        reason = error.strerror or type(error).__name__
        raise StateUnavailable(
            f"503: STATE_DIR or BATCH_DIR cannot be used ({reason}), so files and batches are temporarily unavailable; "
            f"embedding is not."
        ) from error


class BriefReads:
    """Reads for callers that rather do without than wait, again and again: a disk that hangs keeps one thread at most.

    Belongs to the event loop's thread.
    """

    def __init__(self) -> None:
        self._thread = LastingThreads(1, "brief-reads")
        self._given_up: Future[Any] | None = None

    async def read(self, read: Callable[[], T]) -> T:
        """As `read_from_disk`, but refused while a read hangs whose caller was cancelled.

        Raises:
            InsufficientStorage, StateUnavailable: as there. ShuttingDown: `close` was called.
        """
        if self._given_up is not None and not self._given_up.done():
            raise StateUnavailable("503: the disk of files and batches does not answer; try again.")
        try:
            reading = self._thread.submit(read)
        except RuntimeError:
            raise ShuttingDown from None
        try:
            with _errors_for_clients():
                return await asyncio.wrap_future(reading)
        except asyncio.CancelledError:
            if not reading.done():  # one that had not begun is cancelled by now
                self._given_up = reading
            raise

    def close(self) -> None:
        """Let the thread end when it has nothing to do."""
        self._thread.shutdown(wait=False, cancel_futures=True)


Stop = Callable[[], Awaitable[bool]]
"""Whether to stop waiting; it may read the disk."""


async def never() -> bool:
    """Wait for as long as it takes."""
    return False


class DiskPatience:
    """Writes of one batch, retried until they succeed: a full or failing disk delays a batch and does not end it."""

    def __init__(self, batch_id: str) -> None:
        self._batch_id = batch_id
        self._again = asyncio.Event()
        self.waiting = False

    def wake(self) -> None:
        """Try again now."""
        self._again.set()

    async def until_done(self, write: Callable[[], T], stop: Stop = never) -> T | None:
        """Call a function in a thread until it raises neither OSError nor FilesFull; None if `stop`
        returns true after a failure.

        The function must be idempotent.
        """
        while True:
            self._again.clear()
            try:
                done = await in_thread(write)
            except (OSError, FilesFull) as error:
                self._log(error)
                if await stop():
                    return None
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_SECONDS):
                        await self._again.wait()
            else:
                self.waiting = False
                return done

    def _log(self, error: OSError | FilesFull) -> None:
        """Once, not at every try."""
        if not self.waiting:
            reason = error.message if isinstance(error, FilesFull) else str(error)
            logger.error("a batch waits for the disk: %s", reason, extra={"batch": self._batch_id})
        self.waiting = True


class FileQuota:
    """The bytes of all files below some folders, against the most they may be. For any thread.

    Other servers may write there too, so the folders are measured again every FRESH_SECONDS.
    """

    def __init__(self, folders: Sequence[Path], max_bytes: int) -> None:
        self._folders = folders
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._used = 0
        self._looked = -inf

    def take(self, size: int) -> None:
        """Reserve bytes that are about to be written.

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
        """Measure again the next time: something was deleted."""
        self._looked = -inf


def _size(folder: str | Path) -> int:
    """Bytes of the files below a folder; what is deleted meanwhile counts as none."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                inside = entry.is_dir(follow_symlinks=False)
                total += _size(entry.path) if inside else entry.stat(follow_symlinks=False).st_size
    return total
