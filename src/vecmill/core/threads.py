"""Threads for what must not hold up the event loop: tokenizing, parsing, encoding."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from vecmill.core.errors import ShuttingDown

T = TypeVar("T")

# Characters or bytes of work that a person may be waiting for; more takes its turn among the large.
SMALL = 16_384


class WorkerThreads:
    """`workers` threads for large pieces of work, and one more for small ones, which never wait behind the large."""

    def __init__(self, workers: int) -> None:
        self._large = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self._small = ThreadPoolExecutor(1, thread_name_prefix="small-worker")

    async def run(self, function: Callable[[], T], *, size: int) -> T:
        """Call the function in a thread. `size` is in characters or bytes.

        Raises:
            ShuttingDown: there are no threads any more.
        """
        threads = self._small if size <= SMALL else self._large
        try:
            running = threads.submit(function)
        except RuntimeError:
            raise ShuttingDown from None
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ShuttingDown from None  # the threads ended before it was its turn

    async def run_if_large(self, function: Callable[[], T], *, size: int) -> T:
        """As `run`, but what is small is called at once: for work that costs less than the way to a thread."""
        return function() if size <= SMALL else await self.run(function, size=size)

    def shutdown(self) -> None:
        """Let running calls end, cancel the others, do not wait."""
        for threads in (self._large, self._small):
            threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """Call a function; None where it takes longer than `seconds`, and goes on in its thread.

    Raises:
        Exception: what the function raised.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # raised again in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return results[0] if results else None
