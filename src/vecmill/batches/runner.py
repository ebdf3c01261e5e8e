"""Which batches are run here and now: the oldest that nobody else runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import perf_counter

from vecmill.batches.endpoint import Endpoint
from vecmill.batches.record import BatchRecord, Status
from vecmill.batches.run import BatchRun, Surroundings, Suspended
from vecmill.batches.threads import in_thread
from vecmill.storage.files import FileLock

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # what another server created or cancelled is found after this
SWEEP_SECONDS = 60.0
AFTER_A_FAULT_SECONDS = 60.0
# For the lines that a batch has begun with when the server stops. What takes longer is given up: the cache has those of
# its vectors that were computed.
SUSPEND_SECONDS = 2.0


class Runner:
    """Runs batches until it is closed. Belongs to the event loop's thread."""

    def __init__(
        self,
        around: Surroundings,
        endpoints: Mapping[str, Endpoint],
        max_active: int,
        sweep: Callable[[], None],
    ) -> None:
        """`sweep` deletes what has expired; it is called in a thread now and then."""
        self._around = around
        self._endpoints = endpoints
        self._max_active = max_active
        self._sweep = sweep
        self._next_sweep = 0.0
        self._wake = asyncio.Event()
        self.waiting = False
        """Whether the disk keeps it from looking for batches."""
        self._active: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._not_before: dict[str, float] = {}
        self._loop = asyncio.create_task(self._look_again_and_again(), name="batches")
        self.counts: Mapping[Status, int] = {}
        """Batches by state, as they were when last looked for."""

    def wake(self) -> None:
        """Look now: a batch was created or cancelled, or a file deleted."""
        self._wake.set()
        for run, _ in self._active.values():
            run.wake()

    async def suspend(self) -> None:
        """Begin with nothing more; what was begun with is put on disk if it soon can be."""
        self._loop.cancel()
        for run, _ in self._active.values():
            run.suspend()
        if tasks := {task for _, task in self._active.values()}:
            await asyncio.wait(tasks, timeout=SUSPEND_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Stop; what is committed stays, and whoever comes next goes on from there."""
        tasks = [self._loop, *(task for _, task in self._active.values())]
        for run, _ in self._active.values():
            run.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_again_and_again(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
                self.waiting = False
            except OSError as error:  # the folder cannot be used now
                if not self.waiting:
                    logger.error("batches wait for the disk: %s", error)
                self.waiting = True
            except Exception:  # whatever it is, the other batches must go on
                logger.exception("looking for batches failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()

    async def _look(self) -> None:
        now = self._around.clock()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            await in_thread(self._sweep)
        records, cancelled = await in_thread(self._pending)
        for record in records:
            over = record.id in cancelled or now >= record.expires_at
            if record.id in self._active:
                if over:
                    self._active[record.id][0].interrupt()
            # What only has to be ended takes no turn.
            elif (over or len(self._active) < self._max_active) and now >= self._not_before.get(record.id, 0.0):
                await self._try(record.id)

    def _pending(self) -> tuple[list[BatchRecord], set[str]]:
        records = self._around.store.all()
        self.counts = {status: sum(record.status is status for record in records) for status in Status}
        pending = [record for record in records if not record.ended]
        return pending, {record.id for record in pending if self._around.store.cancel_asked(record.id) is not None}

    async def _try(self, batch_id: str) -> None:
        locked = await in_thread(self._locked, batch_id)
        if locked is None:
            return
        lock, record = locked
        run = BatchRun(self._around, self._endpoints[record.endpoint], record)
        task = asyncio.create_task(self._run(run, lock), name=batch_id)
        self._active[batch_id] = (run, task)

    def _locked(self, batch_id: str) -> tuple[FileLock, BatchRecord] | None:
        """A batch that nobody else runs, as it is now: it may have been changed by whoever had the lock before."""
        lock = self._around.store.lock(batch_id)
        if lock is None:
            return None
        record = self._around.store.get(batch_id)
        if record.ended or record.endpoint not in self._endpoints:
            lock.release()
            return None
        return lock, record

    async def _run(self, run: BatchRun, lock: FileLock) -> None:
        batch_id, started = run.record.id, perf_counter()
        try:
            logger.info("batch begins", extra=_facts(run.record))
            await run.run()
        except Suspended:
            logger.info("batch goes on after the restart", extra=_facts(run.record))
        except Exception:
            logger.exception("a batch stopped for a fault; it is taken up again", extra={"batch": batch_id})
            self._not_before[batch_id] = self._around.clock() + AFTER_A_FAULT_SECONDS
        else:
            seconds = round(perf_counter() - started, 1)
            logger.info("batch ended", extra={**_facts(run.record), "seconds": seconds})
        finally:
            lock.release()
            del self._active[batch_id]
            self._wake.set()


def _facts(record: BatchRecord) -> dict[str, object]:
    progress = record.progress
    return {
        "batch": record.id,
        "endpoint": record.endpoint,
        "status": record.status.value,
        "lines": record.total,
        "completed": progress.completed,
        "failed": progress.failed,
    }
