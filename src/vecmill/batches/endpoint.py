"""What answers the lines of a batch, given by the layer above; and the window of lines being answered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from vecmill.batches.disk import in_thread
from vecmill.batches.input import InputLine, LineGroup, LineReader
from vecmill.core.types import Caller


@dataclass(frozen=True, slots=True)
class LineResult:
    """What the endpoint answers to one line, as it would over HTTP."""

    status: int
    body: bytes
    """JSON."""
    tokens: int = 0
    cached_tokens: int = 0
    """Those of `tokens` that were in the cache."""
    model: str | None = None
    """The model that answered."""
    hint: str = ""
    """What HTTP would say in a header: which of the line's fields are not read."""

    @property
    def ok(self) -> bool:
        """Whether it goes to the output, not to the errors."""
        return self.status < 400


class Endpoint(Protocol):
    """One of the API's endpoints. Belongs to the event loop's thread."""

    def texts(self, body: Mapping[str, Any]) -> int:
        """Roughly how many texts a body has; it is not validated yet. For any thread."""
        ...

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Sequence[LineResult]:
        """Answer each line. Waits while the server has no room; raises only on a bug.

        `caller`: the batch, which takes turns as a job of whoever created it, in the bulk lane whatever its lines say.
        """
        ...


# Besides the limit on lines, so that very long lines do not fill the server's queue.
WINDOW_BYTES = 1_048_576
FEWEST_GROUPS = 2  # the device has the second to do while the first is written

Answered = tuple[LineGroup, Sequence[LineResult]]


class Turns:
    """A shared/exclusive lock: groups of all batches run together, or one line alone. For the event loop's thread."""

    def __init__(self) -> None:
        self._together = 0
        self._none_together, self._none_alone = asyncio.Event(), asyncio.Event()
        self._none_together.set()
        self._none_alone.set()
        self._exclusive = asyncio.Lock()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Hold the lock shared, once nobody holds it alone or waits to."""
        while not self._none_alone.is_set():
            await self._none_alone.wait()
        self._together += 1
        self._none_together.clear()
        try:
            yield
        finally:
            self._together -= 1
            if not self._together:
                self._none_together.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the lock alone, once all others have released it."""
        async with self._exclusive:
            self._none_alone.clear()
            try:
                await self._none_together.wait()
                yield
            finally:
                self._none_alone.set()


class Window:
    """The groups in flight, in input order: unanswered, or answered and not on disk. For the event loop's thread."""

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
        self._groups: deque[tuple[LineGroup, asyncio.Task[Sequence[LineResult]]]] = deque()
        self._exhausted = False

    @property
    def groups(self) -> int:
        """How many are in flight."""
        return len(self._groups)

    async def fill(self) -> bool:
        """Start as many groups as there is room for; False if all of the input is answered and on disk.

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
        """Wait until the first group is answered or `other` has ended."""
        await asyncio.wait({self._groups[0][1], other}, return_when=asyncio.FIRST_COMPLETED)

    def take(self) -> list[Answered]:
        """The leading groups that are answered; they stay in the window until `release`."""
        taken = []
        for group, task in self._groups:
            if not task.done():
                break
            taken.append((group, task.result()))
        return taken

    def release(self, count: int) -> None:
        """Remove the first `count` groups: they are on disk."""
        for _ in range(count):
            self._groups.popleft()

    async def drop(self) -> None:
        """Cancel what is in flight and close the input."""
        tasks = [task for _, task in self._groups]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._groups.clear()
        await in_thread(self._reader.close)

    async def _answer(self, group: LineGroup) -> Sequence[LineResult]:
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
