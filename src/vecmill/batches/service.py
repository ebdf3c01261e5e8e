"""What the routes call: files and batches from the state folder's opening to its closing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from vecmill.batches.endpoint import Endpoint
from vecmill.batches.files import FileStore, StoredFile
from vecmill.batches.record import BatchRecord, Status
from vecmill.batches.room import Room
from vecmill.batches.run import Surroundings
from vecmill.batches.runner import Runner
from vecmill.batches.store import BatchStore
from vecmill.batches.sweep import Sweep, files_of
from vecmill.batches.trouble import on_disk
from vecmill.batches.upload import Upload, too_large
from vecmill.config import BatchSettings
from vecmill.core.clock import Clock
from vecmill.core.errors import BatchConflict, InvalidInput, StateUnavailable
from vecmill.core.types import EVERYONE, Viewer
from vecmill.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Batches:
    """Files and batches of one server. Belongs to the event loop's thread."""

    def __init__(
        self, settings: BatchSettings, max_line_bytes: int, telemetry: Telemetry, clock: Clock | None = None
    ) -> None:
        self._settings = settings
        self._max_line_bytes = max_line_bytes
        self._telemetry = telemetry
        self._clock = clock or Clock()
        self._around: Surroundings | None = None
        self._runner: Runner | None = None
        self._problem = "503: the server is starting and temporarily has no files and batches; try again."

    def open(self, folder: Path, problem: str | None) -> None:
        """Have files and batches in this folder. `problem`: why nothing can be kept there; every call says so then,

        without the folder's path, which is the operator's.
        """
        try:
            if problem is None:
                self._around = self._opened(folder)
        except OSError as error:
            logger.error("STATE_DIR=%s cannot be used (%s): no files and batches", folder, error)
            problem = f"STATE_DIR cannot be used ({error.strerror})."
        if problem is not None:
            reason = problem.replace(f"STATE_DIR={folder}", "STATE_DIR")
            self._problem = f"503: there are no files and batches: {reason}"

    def _opened(self, folder: Path) -> Surroundings:
        files_folder, batches_folder = folder / "files", folder / "batches"
        for path in (files_folder, batches_folder):
            path.mkdir(mode=0o700, exist_ok=True)
        room = Room((files_folder, batches_folder), self._settings.max_files_bytes)
        files = FileStore(files_folder, self._clock, room, self._settings.file_expires_days)
        store = BatchStore(batches_folder)
        # What is there was written in the past, whatever the machine's clock says today.
        self._clock.reach(max((file.created_at for file in files.stored()), default=0.0))
        self._clock.reach(max((max(one.created_at, one.updated_at) for one in store.all()), default=0.0))
        return Surroundings(
            store, files, self._clock, self._telemetry, self._settings.batch_chunk_size, self._max_line_bytes
        )

    @property
    def problem(self) -> str | None:
        """Why files and batches cannot be used now, as a sentence; None where they can."""
        if self._around is None:
            return self._problem
        waiting = self._runner is not None and self._runner.waiting
        return "STATE_DIR cannot be read; batches wait until it can." if waiting else None

    def start(self, endpoints: Mapping[str, Endpoint], device_failed: Callable[[], bool] = lambda: False) -> None:
        """Begin to run batches. `device_failed`: what was being worked on may be the cause, as where a process dies."""
        if self._around is not None:
            self._around = replace(self._around, device_failed=device_failed)
            sweep = Sweep(self._around.store, self._around.files, self._clock, self._settings.file_expires_days)
            self._runner = Runner(self._around, endpoints, self._settings.batches_max_active, sweep)

    async def suspend(self) -> None:
        """Begin with nothing more, as the server is about to stop; takes SUSPEND_SECONDS at the most."""
        if self._runner is not None:
            await self._runner.suspend()

    async def close(self) -> None:
        """Stop running batches; whoever opens the folder next goes on with them."""
        if self._runner is not None:
            await self._runner.close()

    def count(self, status: Status) -> int:
        """Batches in a state, as they were a moment ago."""
        return self._runner.counts.get(status, 0) if self._runner else 0

    async def upload(self, declared_bytes: int, viewer: Viewer = EVERYONE) -> Upload:
        """Begin to take a file of the viewer. `declared_bytes`: how large its sender says that it is.

        Raises:
            BodyTooLarge: it is too large. FilesFull: there is no room. StateUnavailable, InsufficientStorage.
        """
        files, limit = self._surroundings().files, self._settings.max_file_bytes
        if declared_bytes > limit:
            raise too_large(limit)

        def begin() -> Upload:
            files.room.take(0)
            return Upload(files, limit, viewer.owner)

        return await on_disk(begin)

    async def file(self, file_id: str, viewer: Viewer = EVERYONE) -> StoredFile:
        """A file. Here and below what is not the viewer's is not there.

        Raises:
            NoSuchFile: there is none.
        """
        files = self._surroundings().files
        return await on_disk(lambda: files.get(file_id, viewer))

    def path_of(self, file_id: str) -> Path:
        """Where the content of a file is that `file` has found."""
        return self._surroundings().files.data(file_id)

    async def all_files(self, viewer: Viewer = EVERYONE) -> list[StoredFile]:
        """All files, the newest first."""
        files = self._surroundings().files
        found = await on_disk(files.all)
        found = [file for file in found if viewer.sees(file.owner)]
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    async def delete_file(self, file_id: str, viewer: Viewer = EVERYONE) -> None:
        """Delete a file.

        Raises:
            NoSuchFile: there is none. BatchConflict: a batch needs it.
        """
        around = self._surroundings()

        def delete() -> None:
            around.files.get(file_id, viewer)
            for record in around.store.all():
                if not record.ended and file_id in files_of(record):
                    raise BatchConflict(
                        f"The file is needed by batch {record.id}, which is {record.status.value}: cancel that first "
                        f"(POST /v1/batches/{record.id}/cancel), or wait until it has ended."
                    )
            around.files.delete(file_id)

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
        """Have a file worked through, for the viewer and in the turns of `client`.

        Raises:
            NoSuchFile: there is no such input. InvalidInput: it was not meant as one.
        """
        around = self._surroundings()

        def create() -> BatchRecord:
            if around.files.get(input_file_id, viewer).purpose != "batch":
                raise InvalidInput("`input_file_id` must be a file with the purpose `batch`.", param="input_file_id")
            now = self._clock()
            record = BatchRecord(
                id=around.store.new_id(),
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
            around.store.create(record)
            return record

        record = await on_disk(create)
        self.wake()
        return record

    async def get(self, batch_id: str, viewer: Viewer = EVERYONE) -> BatchRecord:
        """A batch.

        Raises:
            NoSuchBatch: there is none.
        """
        store = self._surroundings().store
        return await on_disk(lambda: _as_asked(store, store.get(batch_id, viewer)))

    async def all(self, viewer: Viewer = EVERYONE) -> list[BatchRecord]:
        """All batches, the newest first."""
        store = self._surroundings().store
        return await on_disk(
            lambda: [_as_asked(store, record) for record in reversed(store.all()) if viewer.sees(record.owner)]
        )

    async def cancel(self, batch_id: str, viewer: Viewer = EVERYONE) -> BatchRecord:
        """Ask for a batch to be cancelled; what it has answered stays.

        Raises:
            NoSuchBatch: there is none. BatchConflict: it has ended.
        """
        store = self._surroundings().store

        def cancel() -> BatchRecord:
            record = store.get(batch_id, viewer)
            if record.ends_as not in (None, Status.CANCELLED) or record.ended:
                raise BatchConflict(f"The batch is {record.status.value} already, it cannot be cancelled.")
            store.cancel(batch_id, self._clock())
            return _as_asked(store, record)

        record = await on_disk(cancel)
        self.wake()
        return record

    def _surroundings(self) -> Surroundings:
        if self._around is None:
            raise StateUnavailable(self._problem)
        return self._around

    def wake(self) -> None:
        """Look for work now: there may be room again, or something new."""
        if self._runner is not None:
            self._runner.wake()


def _as_asked(store: BatchStore, record: BatchRecord) -> BatchRecord:
    """A batch that was asked to be cancelled says so before anybody has got round to it."""
    if record.ended or record.ends_as is not None:
        return record
    asked = store.cancel_asked(record.id)
    return record if asked is None else record.model_copy(update={"status": Status.CANCELLING, "cancelling_at": asked})
