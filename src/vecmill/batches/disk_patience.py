"""Waiting for a disk that is full or cannot be written, in place of failing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from vecmill.batches.threads import in_thread
from vecmill.core.errors import FilesFull

T = TypeVar("T")
logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0

Stop = Callable[[], Awaitable[bool]]
"""Whether there is no point in waiting any longer; it may look at the disk."""


async def never() -> bool:
    """Wait for as long as it takes."""
    return False


class DiskPatience:
    """Writes of one batch, tried again until they succeed."""

    def __init__(self, batch_id: str) -> None:
        self._batch_id = batch_id
        self._again = asyncio.Event()
        self.waiting = False

    def wake(self) -> None:
        """Try again now."""
        self._again.set()

    async def until_done(self, write: Callable[[], T], stop: Stop = never) -> T | None:
        """Call a function in a thread until it raises neither OSError nor FilesFull; None where `stop` says so first.

        What it does must be the same the second time.
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
