"""What the routes call: files and batches from the state folder's opening to its closing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vecmill.batches.disk import BriefReads, FileQuota, on_disk, read_from_disk
from vecmill.batches.endpoint import Endpoint
from vecmill.batches.files import FileStore, StoredFile, Upload, too_large
from vecmill.batches.record import BatchRecord, BatchStatus
from vecmill.batches.run import BatchContext
from vecmill.batches.runner import BatchRunner
from vecmill.batches.store import BatchStore, EndedBatch
from vecmill.config import BatchSettings
from vecmill.core.clock import Clock
from vecmill.core.errors import BatchConflict, InvalidInput, StateUnavailable
from vecmill.core.types import EVERYONE, Viewer
from vecmill.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What a look at the disk says of some batches, by their ids."""

    records: Mapping[str, BatchRecord] = field(default_factory=dict)
    input_bytes: Mapping[str, int | None] = field(default_factory=dict)
    """The sizes of their input files; None for a file that is gone."""


@dataclass(frozen=True, slots=True)
class SeenBatches:
    """What is known of batches without a look at the disk."""

    going_on: Sequence[BatchRecord]
    """Those that have not ended, or ended a moment ago; the newest first."""
    ended: Sequence[EndedBatch]
    """All others, the newest first."""
    ended_ids: frozenset[str]
    """Of those that were asked for, those that have ended."""
    counts: Counter[BatchStatus]


class BatchService:
    """Files and batches of one server. Belongs to the event loop's thread."""

    def __init__(
        self, settings: BatchSettings, max_line_bytes: int, telemetry: Telemetry, clock: Clock | None = None
    ) -> None:
        self._settings = settings
        self._max_line_bytes = max_line_bytes
        self._telemetry = telemetry
        self._clock = clock or Clock()
        self._context: BatchContext | None = None
        self._runner: BatchRunner | None = None
        self._brief = BriefReads()
        self._setting = "STATE_DIR"
        self._problem = "503: the server is starting and temporarily has no files and batches; try again."

    def open(self, folder: Path, problem: str | None, setting: str = "STATE_DIR") -> None:
        """Use this folder, which `setting` names. `problem`: why nothing can be stored there.

        Every call repeats it then, without the folder's path, which is for the operator.
        """
        self._setting = setting
        try:
            if problem is None:
                self._context = self._opened(folder)
        except OSError as error:
            logger.error("%s=%s cannot be used (%s): no files and batches", setting, folder, error)
            problem = f"{setting} cannot be used ({error.strerror})."
        if problem is not None:
            reason = problem.replace(f"{setting}={folder}", setting)
            self._problem = f"503: there are no files and batches: {reason}"

    def _opened(self, folder: Path) -> BatchContext:
        files_folder, batches_folder = _folders(folder)
        quota = FileQuota((files_folder, batches_folder), self._settings.max_files_bytes)
        files = FileStore(files_folder, self._clock, quota, self._settings.file_expires_days)
        store = BatchStore(batches_folder)
        # What is stored was written in the past, whatever the machine's clock says now.
        self._clock.reach(max((file.created_at for file in files.known()), default=0.0))
        for batch in store.open():
            self._clock.reach(max(batch.created_at, batch.updated_at))
        for ended in store.ended().newest:
            self._clock.reach(max(ended.created_at, ended.updated_at))
        return BatchContext(
            store,
            files,
            self._clock,
            self._telemetry,
            chunk_size=self._settings.batch_chunk_size,
            max_line_bytes=self._max_line_bytes,
            keep_days=self._settings.file_expires_days,
        )

    def begin_anew(self, folder: Path) -> None:
        """Another folder has taken the place of this one. For any thread.

        Raises:
            OSError: it cannot be written.
        """
        if self._context is not None:
            _folders(folder)
            self._context.files.quota.forget()

    @property
    def problem(self) -> str | None:
        """Why files and batches cannot be used now, as a sentence; None where they can."""
        if self._context is None:
            return self._problem
        waiting = self._runner is not None and self._runner.waiting
        return f"{self._setting} cannot be read; batches wait until it can." if waiting else None

    def start(self, endpoints: Mapping[str, Endpoint], device_failed: Callable[[], bool] = lambda: False) -> None:
        """Start to run batches. `device_failed`: the lines being run may be the cause, as if the process had died."""
        if self._context is not None:
            self._context = replace(self._context, device_failed=device_failed)
            self._runner = BatchRunner(self._context, endpoints, self._settings.batches_max_active)

    async def suspend(self) -> None:
        """Start nothing more, as the server is about to stop; takes SUSPEND_SECONDS at the most."""
        if self._runner is not None:
            await self._runner.suspend()

    async def close(self) -> None:
        """Stop running batches; whoever opens the folder next continues them."""
        self._brief.close()
        if self._runner is not None:
            await self._runner.close()

    def count(self, status: BatchStatus) -> int:
        """Batches in a state, as they were a moment ago."""
        return self._runner.counts.get(status, 0) if self._runner else 0

    async def upload(self, declared_bytes: int, viewer: Viewer = EVERYONE) -> Upload:
        """Start to receive a file of the viewer. `declared_bytes`: its size by its sender's account.

        Raises:
            BodyTooLarge: it is too large. FilesFull: there is no room. StateUnavailable, InsufficientStorage.
        """
        files, limit = self._opened_context().files, self._settings.max_file_bytes
        if declared_bytes > limit:
            raise too_large(limit)

        def begin() -> Upload:
            files.quota.take(0)
            return Upload(files, limit, viewer.owner)

        return await on_disk(begin)

    async def file(self, file_id: str, viewer: Viewer = EVERYONE) -> StoredFile:
        """A file. Here and below what is not the viewer's is not there.

        Raises:
            NoSuchFile: there is none.
        """
        files = self._opened_context().files
        return await read_from_disk(lambda: files.get(file_id, viewer))

    def path_of(self, file_id: str) -> str:
        """Where the content of a file is that `file` has found."""
        return self._opened_context().files.data(file_id)

    async def file_ids(self, viewer: Viewer = EVERYONE, purpose: str | None = None) -> list[str]:
        """The ids of all files, or of those with a purpose, the newest first."""
        files = self._opened_context().files
        return await read_from_disk(lambda: files.ids(viewer, purpose))

    async def files(self, file_ids: Sequence[str], viewer: Viewer = EVERYONE) -> list[StoredFile]:
        """These files, without those that are gone."""
        files = self._opened_context().files
        described = await read_from_disk(lambda: files.described(file_ids))
        return [file for file in described if viewer.sees(file.owner)]

    async def delete_file(self, file_id: str, viewer: Viewer = EVERYONE) -> None:
        """Delete a file.

        Raises:
            NoSuchFile: there is none. BatchConflict: a batch needs it.
        """
        context = self._opened_context()

        def delete() -> None:
            context.files.get(file_id, viewer)
            for record in context.store.open():
                if file_id in record.file_ids:
                    raise BatchConflict(
                        f"The file is needed by batch {record.id}, which is {record.status.value}: cancel that first "
                        f"(POST /v1/batches/{record.id}/cancel), or wait until it has ended."
                    )
            context.files.delete(file_id)

        await on_disk(delete)
        self.wake()

    async def create(
        self,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_seconds: float,
        metadata: Mapping[str, str] | None,
        output_expires_seconds: float | None,
        viewer: Viewer = EVERYONE,
        client: str = "batches",
    ) -> BatchRecord:
        """Create a batch of the viewer, which takes turns as one of the jobs of `client`.

        Raises:
            NoSuchFile: there is no such input. InvalidInput: it was not meant as one.
        """
        context = self._opened_context()

        def create() -> BatchRecord:
            if context.files.get(input_file_id, viewer).purpose != "batch":
                raise InvalidInput("`input_file_id` must be a file with the purpose `batch`.", param="input_file_id")
            now = self._clock()
            record = BatchRecord(
                id=context.store.new_id(),
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=completion_window,
                created_at=now,
                updated_at=now,
                expires_at=now + window_seconds,
                metadata=metadata,
                output_expires_seconds=output_expires_seconds,
                owner=viewer.owner,
                client=client,
            )
            context.store.create(record)
            return record

        record = await on_disk(create)
        if self._runner is not None:
            self._runner.created(record)
        return record

    async def get(self, batch_id: str, viewer: Viewer = EVERYONE) -> BatchRecord:
        """A batch.

        Raises:
            NoSuchBatch: there is none.
        """
        store = self._opened_context().store
        return await read_from_disk(lambda: _with_cancellation(store, store.get(batch_id, viewer)))

    async def ids(self, viewer: Viewer = EVERYONE) -> list[str]:
        """The ids of all batches, the newest first."""
        store = self._opened_context().store

        def look() -> list[str]:
            found = [(record.created_at, record.id) for record in store.open() if viewer.sees(record.owner)]
            ended = [(batch.created_at, batch.id) for batch in store.ended(viewer).newest]
            return [batch_id for _, batch_id in sorted([*found, *ended], reverse=True)]

        return await read_from_disk(look)

    async def records(self, batch_ids: Sequence[str], viewer: Viewer = EVERYONE) -> list[BatchRecord]:
        """These batches, without those that are gone."""
        store = self._opened_context().store

        def read() -> list[BatchRecord]:
            records = store.records(batch_ids)
            return [_with_cancellation(store, record) for record in records if viewer.sees(record.owner)]

        return await read_from_disk(read)

    def seen(self, viewer: Viewer = EVERYONE, among: Collection[str] = ()) -> SeenBatches:
        """The viewer's batches as they were a second ago, and which of those `among` these ids have ended; none before
        `start`. Reads no disk."""
        if self._runner is None or self._context is None:
            return SeenBatches([], [], frozenset(), Counter())
        found = [record for record in self._runner.seen() if viewer.sees(record.owner)]
        ended = self._context.store.ended(viewer, [*(record.id for record in found), *among])
        going_on = [record for record in found if record.id not in ended.ids]
        counts = Counter(record.status for record in going_on) + ended.counts
        return SeenBatches(going_on, ended.newest, ended.ids, counts)

    def runs(self, batch_id: str) -> bool:
        """Whether this server works on a batch now."""
        return self._runner is not None and self._runner.runs(batch_id)

    async def look(
        self, batch_ids: Collection[str], known: Mapping[str, BatchRecord], viewer: Viewer = EVERYONE
    ) -> LookedUp:
        """These batches, without those that are gone; the records of those that are `known` are not read.

        For whoever looks again and again, and rather does without than wait for a disk that hangs.

        Raises:
            StateUnavailable: an earlier look was given up, and hangs still.
        """
        context = self._opened_context()

        def look() -> LookedUp:
            unknown = context.store.records(batch_id for batch_id in batch_ids if batch_id not in known)
            found = {record.id: record for record in unknown if viewer.sees(record.owner)}
            found |= {batch_id: known[batch_id] for batch_id in batch_ids if batch_id in known}
            sizes = {batch_id: context.files.size(record.input_file_id) for batch_id, record in found.items()}
            return LookedUp(found, sizes)

        return await self._brief.read(look) if batch_ids else LookedUp()

    async def cancel(self, batch_id: str, viewer: Viewer = EVERYONE) -> BatchRecord:
        """Request that a batch is cancelled; what it has answered stays.

        Raises:
            NoSuchBatch: there is none. BatchConflict: it has ended.
        """
        store = self._opened_context().store

        def cancel() -> BatchRecord:
            record = store.get(batch_id, viewer)
            if record.ends_as not in (None, BatchStatus.CANCELLED) or record.ended:
                raise BatchConflict(f"The batch is {record.status.value} already, it cannot be cancelled.")
            store.cancel(batch_id, self._clock())
            return _with_cancellation(store, record)

        record = await on_disk(cancel)
        self.wake()
        return record

    def _opened_context(self) -> BatchContext:
        if self._context is None:
            raise StateUnavailable(self._problem)
        return self._context

    def wake(self) -> None:
        """Look for work now: there may be room again, or a new batch."""
        if self._runner is not None:
            self._runner.wake()


def _folders(folder: Path) -> tuple[Path, Path]:
    """Those of files and of batches, made if need be."""
    paths = folder / "files", folder / "batches"
    for path in paths:
        path.mkdir(mode=0o700, exist_ok=True)
    return paths


def _with_cancellation(store: BatchStore, record: BatchRecord) -> BatchRecord:
    """The record, `cancelling` from the moment of the request on: whoever runs the batch may not have seen it yet."""
    if record.ended or record.ends_as is not None:
        return record
    requested_at = store.cancel_requested_at(record.id)
    if requested_at is None:
        return record
    return record.model_copy(update={"status": BatchStatus.CANCELLING, "cancelling_at": requested_at})
