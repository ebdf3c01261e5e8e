"""Which batches this server runs now: the oldest that nobody else runs. And deleting what has expired."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from time import perf_counter

from vecmill.batches.disk import in_thread
from vecmill.batches.endpoint import Endpoint
from vecmill.batches.files import DAY
from vecmill.batches.record import BatchRecord, BatchStatus
from vecmill.batches.run import BatchContext, BatchRun, Suspended
from vecmill.batches.store import BatchLock, LockLost

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # until a batch that another server created or cancelled is noticed
SWEEP_SECONDS = 60.0
AFTER_A_FAULT_SECONDS = 60.0
# How long a stopping server waits for lines in flight. What takes longer is dropped; vectors computed so far are in the
# cache.
SUSPEND_SECONDS = 2.0


class BatchRunner:
    """Runs batches until it is closed. Belongs to the event loop's thread."""

    def __init__(self, context: BatchContext, endpoints: Mapping[str, Endpoint], max_active: int) -> None:
        self._context = context
        self._endpoints = endpoints
        self._max_active = max_active
        self._next_sweep = 0.0
        self._wake = asyncio.Event()
        self.waiting = False
        """Whether the folder of batches cannot be read now."""
        self._active: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._not_before: dict[str, float] = {}
        self._loop = asyncio.create_task(self._look_again_and_again(), name="batches")
        self.counts: Mapping[BatchStatus, int] = {}
        """Batches by state, as they were when last looked for."""
        self._records: Sequence[BatchRecord] = ()
        self._cancelled: Collection[str] = ()

    def wake(self) -> None:
        """Look now: a batch was created or cancelled, or a file deleted."""
        self._wake.set()
        for run, _ in self._active.values():
            run.wake()

    async def suspend(self) -> None:
        """Start nothing more; wait up to SUSPEND_SECONDS until the started lines are on disk."""
        self._loop.cancel()
        for run, _ in self._active.values():
            run.suspend()
        if tasks := {task for _, task in self._active.values()}:
            await asyncio.wait(tasks, timeout=SUSPEND_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Stop; what is committed stays, and whoever runs the batches next continues from there."""
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
            except Exception:  # the other batches must go on
                logger.exception("looking for batches failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()

    async def _look(self) -> None:
        now = self._context.clock()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            await in_thread(_delete_expired, self._context)
        pending, cancelled = await in_thread(self._pending)
        self._cancelled = cancelled
        for record in pending:
            over = record.id in cancelled or now >= record.expires_at
            if record.id in self._active:
                if over:
                    self._active[record.id][0].interrupt()
            # A batch that only has to be ended needs no free place.
            elif (over or len(self._active) < self._max_active) and now >= self._not_before.get(record.id, 0.0):
                await self._try(record.id)

    def _pending(self) -> tuple[list[BatchRecord], set[str]]:
        store = self._context.store
        self._records = pending = store.open()
        self.counts = Counter(record.status for record in pending) + store.ended().counts
        return pending, {
            record.id for record in pending if self._context.store.cancel_requested_at(record.id) is not None
        }

    def seen(self) -> list[BatchRecord]:
        """The batches that had not ended a second ago, those that run here as they are; the newest first.

        Reads no disk.
        """
        running = {batch_id: run.record for batch_id, (run, _) in self._active.items()}
        return [self._shown(running.get(record.id, record)) for record in reversed(self._records)]

    def _shown(self, record: BatchRecord) -> BatchRecord:
        if record.id in self._cancelled and not record.ended and record.ends_as is None:
            return record.model_copy(update={"status": BatchStatus.CANCELLING})
        return record

    def created(self, record: BatchRecord) -> None:
        """A batch was created: it is seen at once, and run soon."""
        self._records = [*self._records, record]
        self.wake()

    def runs(self, batch_id: str) -> bool:
        """Whether this server works on a batch now."""
        return batch_id in self._active

    async def _try(self, batch_id: str) -> None:
        locked = await in_thread(self._locked, batch_id)
        if locked is None:
            return
        lock, record = locked
        run = BatchRun(self._context, self._endpoints[record.endpoint], record, lock)
        task = asyncio.create_task(self._run(run, lock), name=batch_id)
        self._active[batch_id] = (run, task)

    def _locked(self, batch_id: str) -> tuple[BatchLock, BatchRecord] | None:
        """The lock of a batch that nobody else runs, and its record, read after the lock was taken."""
        lock = self._context.store.lock(batch_id)
        if lock is None:
            return None
        record = self._context.store.get(batch_id)
        if record.ended or record.endpoint not in self._endpoints:
            lock.release()
            return None
        return lock, record

    async def _run(self, run: BatchRun, lock: BatchLock) -> None:
        batch_id, started = run.record.id, perf_counter()
        try:
            logger.info("batch begins", extra=_facts(run.record))
            await run.run()
        except Suspended:
            logger.info("batch goes on after the restart", extra=_facts(run.record))
        except LockLost:
            logger.error(
                "a batch is run by another server: this one was cut off from its files", extra=_facts(run.record)
            )
        except Exception:
            logger.exception("a batch stopped for a fault; it is taken up again", extra={"batch": batch_id})
            self._not_before[batch_id] = self._context.clock() + AFTER_A_FAULT_SECONDS
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


def _delete_expired(context: BatchContext) -> None:
    """Delete expired files, the remains of broken uploads, and batches that ended long ago. For any thread.

    Several servers may do it at the same time.
    """
    store, files, keep_seconds = context.store, context.files, context.keep_days * DAY
    try:
        # In this order: a file's id is in a batch's record before the file has its final name.
        orphans = files.orphans()
        in_use = {file_id for record in store.open() for file_id in record.file_ids}
        files.sweep(orphans, in_use)
        store.sweep()
        for ended in store.ended().newest:
            if ended.updated_at + keep_seconds <= context.clock():
                store.forget(ended.id)
    except OSError as error:
        logger.warning("files that have expired cannot be deleted: %s", error)
