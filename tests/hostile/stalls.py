"""How long an event loop does not turn while something runs beside it, and how much memory that takes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

TURN_SECONDS = 0.005
# What must hold is a tenth of a second; a busy machine takes the processor away for longer. Before their work was
# bounded these requests held the event loop for 3 to 25 seconds.
LONGEST_STALL = 1.5
PAGE = 4096


@dataclass(slots=True)
class Longest:
    """The longest time between two turns that were due one after the other."""

    seconds: float = 0.0

    def saw(self, seconds: float) -> None:
        """Note the time from one turn to the next."""
        self.seconds = max(self.seconds, seconds - TURN_SECONDS)


@asynccontextmanager
async def longest_stall(clock: Callable[[], float] = perf_counter) -> AsyncIterator[Longest]:
    """Of this event loop, while the block runs.

    `clock`: `thread_time` counts what the loop's own thread does, however busy the machine is.
    """
    longest = Longest()

    async def turn() -> None:
        last = clock()
        while True:
            await asyncio.sleep(TURN_SECONDS)
            now = clock()
            longest.saw(now - last)
            last = now

    turning = asyncio.create_task(turn())
    try:
        yield longest
        await asyncio.sleep(2 * TURN_SECONDS)  # a stall at the very end is seen too
    finally:
        turning.cancel()


@dataclass(slots=True)
class Memory:
    """Bytes beyond those that were taken at the beginning."""

    highest: int = 0


@contextmanager
def memory_taken() -> Iterator[Memory]:
    """The most that this process takes while the block runs, beyond what it took before."""
    memory, before, over = Memory(), _resident(), threading.Event()

    def look() -> None:
        while not over.is_set():
            memory.highest = max(memory.highest, _resident() - before)
            sleep(TURN_SECONDS)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield memory
    finally:
        over.set()
        looking.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
