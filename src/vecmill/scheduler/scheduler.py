"""The queues, the loop that empties them into a `Runner`, and the promise that every future is resolved."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

from vecmill.core.errors import BatchFailed, EngineFailed, ShuttingDown, VecmillError
from vecmill.core.protocols import Runner
from vecmill.core.types import Row
from vecmill.scheduler.policy import Budget, Cut, cut
from vecmill.scheduler.sequence import Sequence, SequenceResult

logger = logging.getLogger(__name__)

# One batch runs while the next is already packed; a third would only wait, cut before it had to be.
BATCHES_IN_FLIGHT = 2


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start; read by telemetry."""

    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    abandoned: int = 0
    busy_seconds: float = 0.0


class Scheduler:
    """Cuts batches for a `Runner`, first come first served for each model.

    All methods belong to the event loop's thread. `on_batch` is told rows, tokens and seconds of each batch.
    """

    def __init__(
        self,
        runner: Runner,
        budget: Budget,
        *,
        on_batch: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.stats = SchedulerStats()
        self._runner = runner
        self._budget = budget
        self._on_batch = on_batch
        self._on_failure = on_failure
        self._waiting: dict[str, deque[Sequence]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(BATCHES_IN_FLIGHT)
        self._closed: VecmillError | None = None
        self._loop = asyncio.create_task(self._cut_forever(), name="scheduler")
        self._loop.add_done_callback(self._loop_ended)

    @property
    def waiting(self) -> int:
        """Sequences not yet in a batch."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Batches given to the runner and not yet answered."""
        return len(self._running)

    def submit(self, model: str, rows: Iterable[Row]) -> list[asyncio.Future[SequenceResult]]:
        """Queue rows and return one future for each, in order.

        Cancelling a future frees its sequence before it is run.

        Raises:
            ShuttingDown, EngineFailed: the scheduler takes no work any more.
        """
        if self._closed is not None:
            raise self._closed.again()
        loop = asyncio.get_running_loop()
        sequences = [Sequence(row, model, loop.create_future()) for row in rows]
        self._waiting.setdefault(model, deque()).extend(sequences)
        self._wake.set()
        return [sequence.future for sequence in sequences]

    async def close(self) -> None:
        """Refuse new work, let running batches end, fail whatever still waits."""
        self._closed = self._closed or ShuttingDown()
        self._fail_waiting(self._closed)
        self._loop.cancel()
        await asyncio.gather(*self._running, self._loop, return_exceptions=True)

    async def _cut_forever(self) -> None:
        while True:
            await self._wake.wait()
            # The slot first: what arrives while the device is busy still gets into the next batch.
            await self._slots.acquire()
            batch = self._cut_next()
            if batch is None:
                self._slots.release()
                self._wake.clear()
                continue
            task = asyncio.create_task(self._run(batch), name="batch")
            self._running.add(task)
            task.add_done_callback(self._batch_ended)

    def _cut_next(self) -> Cut[Sequence] | None:
        """The next batch, from the model whose first sequence has waited longest; None when nothing waits."""
        while heads := [(queue[0].submitted, model) for model, queue in self._waiting.items() if queue]:
            queue = self._waiting[min(heads)[1]]
            taken = cut(queue, self._budget)
            for _ in range(taken.taken):
                queue.popleft()
            self.stats.abandoned += len(taken.abandoned)
            if taken.batch:
                return taken
        return None

    async def _run(self, taken: Cut[Sequence]) -> None:
        batch = taken.batch
        try:
            await self._run_and_resolve(batch, taken.tokens)
        except EngineFailed as error:
            self._fail(batch, error)
            self._stop(error)
        except VecmillError as error:
            self._fail(batch, error)
        except Exception:
            logger.exception("a batch of %d inputs failed", len(batch))
        finally:
            # Whatever happened, nobody is left waiting.
            self._fail(batch, BatchFailed())

    async def _run_and_resolve(self, batch: tuple[Sequence, ...], tokens: int) -> None:
        started = perf_counter()
        result = await self._runner.run(batch[0].model, [sequence.row for sequence in batch])
        self._count(len(batch), tokens, result.seconds)
        for sequence, row in zip(batch, result.rows, strict=True):
            if sequence.future.done():
                continue
            if isinstance(row, Exception):
                sequence.future.set_exception(row)
            else:
                queued = started - sequence.submitted
                sequence.future.set_result(SequenceResult(row, queued, result.seconds))

    def _count(self, rows: int, tokens: int, seconds: float) -> None:
        self.stats.batches += 1
        self.stats.sequences += rows
        self.stats.tokens += tokens
        self.stats.busy_seconds += seconds
        self._on_batch(rows, tokens, seconds)

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._slots.release()

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("the scheduler's loop ended", exc_info=task.exception())
            self._stop(EngineFailed("503: the scheduler failed and the server must be restarted."))

    def _stop(self, error: VecmillError) -> None:
        if self._closed is None:
            self._closed = error
            self._on_failure(error.message)
        self._fail_waiting(error)

    def _fail_waiting(self, error: VecmillError) -> None:
        self._fail(chain.from_iterable(self._waiting.values()), error)
        self._waiting.clear()

    @staticmethod
    def _fail(sequences: Iterable[Sequence], error: VecmillError) -> None:
        for sequence in sequences:
            if not sequence.future.done():
                sequence.future.set_exception(error.again())
