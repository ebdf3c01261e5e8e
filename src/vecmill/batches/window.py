"""The lines of a batch that are being answered, in the order of the input."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from vecmill.batches.endpoint import Endpoint, LineResult
from vecmill.batches.lines import Group, LineReader
from vecmill.batches.threads import in_thread
from vecmill.core.types import Caller

# Beside the limit on lines, so that the longest of them do not take all of the server's room.
WINDOW_BYTES = 1_048_576
FEWEST_GROUPS = 2  # the device has the second to do while the first is written

Answered = tuple[Group, Sequence[LineResult]]


class Turns:
    """Lines of all batches are worked on together, or one of them alone. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._together = 0
        self._nobody, self._nobody_alone = asyncio.Event(), asyncio.Event()
        self._nobody.set()
        self._nobody_alone.set()
        self._one = asyncio.Lock()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Beside others, once nobody is alone or waits to be."""
        while not self._nobody_alone.is_set():
            await self._nobody_alone.wait()
        self._together += 1
        self._nobody.clear()
        try:
            yield
        finally:
            self._together -= 1
            if not self._together:
                self._nobody.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Once the others are done."""
        async with self._one:
            self._nobody_alone.clear()
            try:
                await self._nobody.wait()
                yield
            finally:
                self._nobody_alone.set()


class Window:
    """Groups in flight: read, being answered, or answered and not yet taken. Belongs to the event loop's thread."""

    def __init__(
        self,
        endpoint: Endpoint,
        caller: Caller,
        reader: LineReader,
        most_lines: int,
        turn: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        """`turn` is held while a group is worked on."""
        self._endpoint = endpoint
        self._turn = turn
        self._caller = caller
        self._reader = reader
        self._most_lines = most_lines
        self._groups: deque[tuple[Group, asyncio.Task[Sequence[LineResult]]]] = deque()
        self._exhausted = False

    @property
    def groups(self) -> int:
        """How many are in flight."""
        return len(self._groups)

    async def fill(self) -> bool:
        """Begin with as many lines as there is room for; False: all are answered and taken.

        Raises:
            InputChanged, OSError: the input cannot be read.
        """
        while not self._exhausted and self._has_room():
            # Half of the room at most: the device has the other half to do while this one is written.
            most = min(self._most_lines - self._lines(), max(1, self._most_lines // FEWEST_GROUPS))
            group = await in_thread(self._reader.next, self._endpoint.texts, most)
            if group is None:
                self._exhausted = True
            else:
                task = asyncio.create_task(
                    self._answer(group), name=f"batch {self._caller.job_id}, line {group.lines[0].number}"
                )
                self._groups.append((group, task))
        return bool(self._groups)

    async def first_or(self, other: asyncio.Task[object]) -> None:
        """Wait until the first group is answered, or for something else."""
        await asyncio.wait({self._groups[0][1], other}, return_when=asyncio.FIRST_COMPLETED)

    def take(self) -> list[Answered]:
        """The groups that are answered and before which none is missing; they stay in the window."""
        taken = []
        for group, task in self._groups:
            if not task.done():
                break
            taken.append((group, task.result()))
        return taken

    def release(self, count: int) -> None:
        """So many of the first groups are on disk."""
        for _ in range(count):
            self._groups.popleft()

    async def drop(self) -> None:
        """Give up what is in flight."""
        tasks = [task for _, task in self._groups]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._groups.clear()
        await in_thread(self._reader.close)

    async def _answer(self, group: Group) -> Sequence[LineResult]:
        async with self._turn():
            return await self._endpoint.run(self._caller, group.lines)

    def _lines(self) -> int:
        return sum(len(group.lines) for group, _ in self._groups)

    def _has_room(self) -> bool:
        lines = self._lines()
        if lines >= self._most_lines:
            return False
        if len(self._groups) < FEWEST_GROUPS:
            return True
        texts = sum(group.texts for group, _ in self._groups)
        size = sum(group.size for group, _ in self._groups)
        return texts < self._most_lines and size < WINDOW_BYTES
