"""Runs one batch from validation to its result files. For whoever holds its lock.

Writes are ordered so that a kill at any moment loses nothing and repeats nothing: first the answers are on disk, then
the record says so; the record has the ids of the result files before these get their names, and says that the batch has
ended after that.

A line may have killed the process. A note on disk says which lines are being run; whoever finds one repeats those lines
one at a time, with nothing else running; a line that was running alone when the process died is not run a third time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vecmill.batches.disk import DiskPatience, Stop, in_thread, never
from vecmill.batches.endpoint import Answered, Endpoint, Turns, Window
from vecmill.batches.files import FileStore
from vecmill.batches.input import Checked, InputChanged, InputLine, LineGroup, LineReader, validate
from vecmill.batches.record import BatchProgress, BatchRecord, BatchStatus, LineError, WorkNote
from vecmill.batches.store import (
    ERRORS,
    OUTPUT,
    AnswerFiles,
    BatchLock,
    BatchStore,
    LockLost,
    answered_lines,
    expired_lines,
    process_died_lines,
)
from vecmill.core.clock import Clock
from vecmill.core.types import Caller, Lane
from vecmill.storage.files import delete
from vecmill.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchContext:
    """What all batches of one server share."""

    store: BatchStore
    files: FileStore
    clock: Clock
    telemetry: Telemetry
    chunk_size: int
    """Lines in flight."""
    max_line_bytes: int
    keep_days: float
    """After which a batch that has ended is deleted."""
    turns: Turns = field(default_factory=Turns)
    device_failed: Callable[[], bool] = lambda: False
    """Whether the process is ending because the device has failed or hangs, which a line may have caused."""


class Suspended(Exception):
    """The batch stays where it is; whoever runs it next continues from there."""


class BatchRun:
    """A batch being run. Belongs to the event loop's thread."""

    def __init__(self, context: BatchContext, endpoint: Endpoint, record: BatchRecord, lock: BatchLock) -> None:
        """`lock` is held until `run` has ended."""
        self._context = context
        self._lock = lock
        self._endpoint = endpoint
        self._interrupted = asyncio.Event()
        self._stopped = self._suspending = False
        self._disk = DiskPatience(record.id)
        self._folder = context.store.folder(record.id)
        self.record = record

    def interrupt(self) -> None:
        """The batch was cancelled or has expired: what is committed stays, the rest is not run."""
        self._interrupted.set()
        self._disk.wake()

    def wake(self) -> None:
        """Retry a write that waits for the disk: there may be room now."""
        self._disk.wake()

    def suspend(self) -> None:
        """Start no more lines; `run` raises Suspended once the started ones are on disk."""
        self._suspending = True
        self._interrupted.set()

    def stop(self) -> None:
        """`run` is about to be cancelled: end the work in its thread soon."""
        self._stopped = True

    async def run(self) -> None:
        """Run the batch to its end. If it is cancelled, any server can continue it later.

        Raises:
            Suspended: it was asked for. LockLost: another server runs it by now; nothing is written any more.
        """
        if self.record.ends_as is None:
            await self._record_outcome(await self._answer())
        await self._finish()

    @property
    def _caller(self) -> Caller:
        """The client that created the batch; its lines take turns as one of that client's jobs."""
        record = self.record
        return Caller(client=record.client, owner=record.owner, job_id=record.id, lane=Lane.BULK, dialect="batch")

    async def _interruption(self) -> BatchStatus | None:
        record = self.record
        if await in_thread(self._context.store.cancel_requested_at, record.id) is not None:
            return BatchStatus.CANCELLED
        return BatchStatus.EXPIRED if self._context.clock() >= record.expires_at else None

    async def _over(self) -> bool:
        return await self._interruption() is not None

    async def _answer(self) -> BatchStatus:
        """Answer the lines; returns the final status."""
        if await self._interruption() is BatchStatus.CANCELLED:
            return BatchStatus.CANCELLED
        if self.record.status is BatchStatus.VALIDATING and not await self._validate():
            return BatchStatus.FAILED
        answers = await self._disk.until_done(lambda: AnswerFiles(self._folder))
        assert answers is not None  # nothing stops it
        try:
            if not answers.holds(self.record.progress):
                await self._save(progress=BatchProgress(input_offset=self.record.first_offset))
            ends_as = await self._work(answers)
            if ends_as is BatchStatus.EXPIRED:
                await self._expire_rest(answers)
        except (InputChanged, FileNotFoundError):
            return await self._refuse("input_file_changed", "The input file is gone, or not what it was.")
        finally:
            answers.close()
        return ends_as

    async def _validate(self) -> bool:
        record, context = self.record, self._context
        try:
            checked: Checked = await in_thread(
                validate,
                context.files.data(record.input_file_id),
                record.endpoint,
                context.max_line_bytes,
                lambda: self._stopped,
            )
        except FileNotFoundError:
            await self._refuse("input_file_not_found", "The input file is gone.")
            return False
        if checked.errors:
            await self._save(errors=tuple(checked.errors), total=checked.total)
            return False
        await self._save(
            status=BatchStatus.IN_PROGRESS,
            in_progress_at=context.clock(),
            total=checked.total,
            first_offset=checked.first_offset,
            progress=BatchProgress(input_offset=checked.first_offset),
        )
        return True

    async def _refuse(self, code: str, message: str) -> BatchStatus:
        await self._save(errors=(LineError(code=code, message=message, param="input_file_id"),))
        return BatchStatus.FAILED

    async def _work(self, answers: AnswerFiles) -> BatchStatus:
        """Answer lines until all are, or until the batch is cancelled or over its time."""
        store, batch_id = self._context.store, self.record.id
        noted = await self._disk.until_done(lambda: store.noted_work(batch_id))
        try:
            if noted is not None and (ends_as := await self._recover(answers, noted)) is not None:
                return ends_as
            ends_as = await self._answer_lines(answers)
            assert ends_as is not None  # without `last_alone` it goes on to the end of the input
            return ends_as
        finally:
            if not self._context.device_failed():
                with suppress(OSError, LockLost):  # the next to run it is careful then
                    await in_thread(self._end_work)

    def _end_work(self) -> None:
        self._lock.check()
        self._context.store.end_work(self.record.id)

    async def _recover(self, answers: AnswerFiles, noted: WorkNote) -> BatchStatus | None:
        """Repeat the lines that a process died on, one at a time; the final status if the batch ends meanwhile."""
        answered = self.record.progress.lines
        last = min(noted.last(answered), self.record.total)
        extra = {"batch": self.record.id, "first": answered + 1, "last": last}
        logger.warning("a process died on lines of a batch; they are done again one at a time", extra=extra)
        if noted.convicts(answered):
            await self._report_death(answers)
        return await self._answer_lines(answers, last)

    async def _report_death(self, answers: AnswerFiles) -> None:
        """Record the next line, which has killed the process twice, as failed."""
        number = self.record.progress.lines + 1
        extra = {"batch": self.record.id, "line": number}
        logger.error("a line of a batch killed the process twice; it is not run again", extra=extra)
        reader = self._reader()
        try:
            if group := await in_thread(reader.next, lambda body: 0, 1):
                await self._fail(answers, group, process_died_lines)
        finally:
            await in_thread(reader.close)

    async def _answer_lines(self, answers: AnswerFiles, last_alone: int | None = None) -> BatchStatus | None:
        """Answer all lines, unless the batch ends before; returns the final status.

        With `last_alone`: only the lines up to that number, one at a time; None once they are done.
        """
        most, turn = self._context.chunk_size, self._context.turns.together
        if last_alone is not None:
            most, turn = 1, partial(self._alone, last_alone)
        else:
            await self._note(most, alone=False)
        interrupted = asyncio.create_task(self._interrupted.wait())
        window = Window(self._endpoint, self._caller, self._reader(), most, turn)
        try:
            while last_alone is None or self.record.progress.lines < last_alone:
                self._interrupted.clear()  # before the look, so that what comes during it is not missed
                if (reason := await self._interruption()) is not None:
                    return reason
                if self._suspending and not window.groups:
                    raise Suspended
                if not self._suspending and not await window.fill():
                    return BatchStatus.COMPLETED
                interrupted = await self._take(answers, window, interrupted)
            return None
        finally:
            interrupted.cancel()
            await window.drop()

    async def _take(self, answers: AnswerFiles, window: Window, interrupted: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Wait for answers and put them on disk; returns the task that waits for the next interruption."""
        await window.first_or(interrupted)
        taken = window.take()
        if taken and await self._commit(answers, taken):
            window.release(len(taken))
        return asyncio.create_task(self._interrupted.wait()) if interrupted.done() else interrupted

    @asynccontextmanager
    async def _alone(self, last: int) -> AsyncIterator[None]:
        """Run nothing else meanwhile; only then the note says that the next line runs alone."""
        async with self._context.turns.alone():
            lines = last - self.record.progress.lines
            await self._note(lines, alone=True)
            yield
            await self._note(lines, alone=False)

    async def _note(self, lines: int, *, alone: bool) -> None:
        note = WorkNote(first=self.record.progress.lines + 1, lines=lines, alone=alone)

        def write() -> None:
            self._lock.check()
            self._context.store.note_work(self.record.id, note)

        await self._disk.until_done(write, self._over)

    def _reader(self) -> LineReader:
        record = self.record
        path = self._context.files.data(record.input_file_id)
        return LineReader(path, record.progress.input_offset, record.progress.lines, record.total)

    async def _commit(self, answers: AnswerFiles, taken: Sequence[Answered]) -> bool:
        """Put answered lines on disk; False where the batch was interrupted while it waited for the disk."""
        results = [result for _, results in taken for result in results]
        lines = [line for group, _ in taken for line in group.lines]
        done = sum(result.ok for result in results)
        model = self.record.model or next((result.model for result in results if result.model), None)
        before = self.record.progress

        def write() -> BatchRecord:
            output, errors = answered_lines(self.record.id, lines, results)
            progress = BatchProgress(
                input_offset=taken[-1][0].stop,
                lines=before.lines + len(lines),
                output_bytes=before.output_bytes + len(output),
                error_bytes=before.error_bytes + len(errors),
                completed=before.completed + done,
                failed=before.failed + len(results) - done,
                tokens=before.tokens + sum(result.tokens for result in results),
                cached_tokens=before.cached_tokens + sum(result.cached_tokens for result in results),
            )
            return self._write(answers, output, errors, progress=progress, model=model)

        return await self._committed(write, self._over)

    async def _expire_rest(self, answers: AnswerFiles) -> None:
        """Put the lines that were not run in time among the errors. Restartable, like everything else."""
        reader = self._reader()
        try:
            while group := await in_thread(reader.next, lambda body: 0, self._context.chunk_size):
                await self._fail(answers, group, expired_lines)
        finally:
            await in_thread(reader.close)

    async def _fail(
        self, answers: AnswerFiles, group: LineGroup, errors_of: Callable[[str, Sequence[InputLine]], bytes]
    ) -> None:
        """Put lines among the errors without running them."""
        before = self.record.progress
        errors = await in_thread(errors_of, self.record.id, group.lines)
        progress = before.model_copy(
            update={
                "input_offset": group.stop,
                "lines": before.lines + len(group.lines),
                "error_bytes": before.error_bytes + len(errors),
                "failed": before.failed + len(group.lines),
            }
        )
        await self._committed(lambda: self._write(answers, b"", errors, progress=progress))

    async def _committed(self, write: Callable[[], BatchRecord], stop: Stop = never) -> bool:
        before = self.record.progress
        record = await self._disk.until_done(write, stop)
        if record is None:
            return False
        self.record = record
        self._context.telemetry.rates.lines_done(record.id, record.progress.lines - before.lines)
        lines = self._context.telemetry.metrics.batch_lines
        lines.labels("completed").inc(record.progress.completed - before.completed)
        lines.labels("failed").inc(record.progress.failed - before.failed)
        return True

    def _write(self, answers: AnswerFiles, output: bytes, errors: bytes, **changes: Any) -> BatchRecord:
        self._context.files.quota.take(len(output) + len(errors))
        self._lock.check()
        answers.append(self.record.progress, output, errors)
        return self._write_record(**changes)

    async def _record_outcome(self, ends_as: BatchStatus) -> None:
        """Persist the final status and the ids of the result files; irreversible."""
        progress = self.record.progress
        changes: dict[str, Any] = {"status": BatchStatus.FINALIZING, "finalizing_at": self._context.clock()}
        if ends_as is BatchStatus.FAILED:
            changes = {}
        elif ends_as is BatchStatus.CANCELLED:
            requested_at = await in_thread(self._context.store.cancel_requested_at, self.record.id)
            changes = {"status": BatchStatus.CANCELLING, "cancelling_at": requested_at}
        await self._save(
            **changes,
            ends_as=ends_as,
            output_file_id=FileStore.new_id() if progress.output_bytes else None,
            error_file_id=FileStore.new_id() if progress.error_bytes else None,
        )

    async def _finish(self) -> None:
        """Give the files their final names, then record that the batch has ended. Idempotent."""
        record = self.record
        assert record.ends_as is not None
        await self._disk.until_done(self._place_files)
        await self._save(status=record.ends_as, **{f"{record.ends_as.value}_at": self._context.clock()})

    def _place_files(self) -> None:
        self._lock.check()
        record, progress = self.record, self.record.progress
        for file_id, name, size in (
            (record.output_file_id, OUTPUT, progress.output_bytes),
            (record.error_file_id, ERRORS, progress.error_bytes),
        ):
            path = f"{self._folder}/{name}"
            if file_id is None:
                delete(path)
                continue
            if os.path.exists(path):
                with open(path, "rb+") as file:
                    file.truncate(size)
            self._context.files.add(
                file_id,
                path,
                size,
                filename=f"{record.id}_{name}",
                purpose="batch_output",
                expires_seconds=record.output_expires_seconds,
                owner=record.owner,
            )

    async def _save(self, **changes: Any) -> None:
        record = await self._disk.until_done(lambda: self._write_record(**changes))
        assert record is not None  # nothing stops it
        self.record = record

    def _write_record(self, **changes: Any) -> BatchRecord:
        self._lock.check()
        record = self.record.model_copy(update={**changes, "updated_at": self._context.clock()})
        self._context.store.save(record)
        return record
