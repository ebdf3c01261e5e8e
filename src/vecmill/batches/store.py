"""The folder of batches: `<id>/batch.json`, its `lock`, `cancel` and `working`, and the answers so far."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from sys import intern
from threading import Lock
from time import time
from typing import NamedTuple

import orjson
from pydantic import ValidationError

from vecmill.batches.endpoint import LineResult
from vecmill.batches.input import InputLine
from vecmill.batches.known import ByCreation
from vecmill.batches.record import BatchProgress, BatchRecord, BatchStatus, WorkNote
from vecmill.core.errors import NoSuchBatch
from vecmill.core.types import EVERYONE, Viewer
from vecmill.storage.files import (
    PRIVATE,
    FileLock,
    delete,
    delete_unfinished,
    read_whole,
    sync_folder,
    write_atomically,
)

logger = logging.getLogger(__name__)

BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
RECORD, LOCK, CANCEL, WORKING = "batch.json", "lock", "cancel", "working"
UNFINISHED = "new."
UNFINISHED_SECONDS = 3600.0
KEPT_RECORDS = 128  # of ended batches that were read lately: what pages show again and again


class EndedBatch(NamedTuple):
    """What is kept in memory of a batch that has ended, some 300 bytes; its record is on disk."""

    created_at: float
    id: str
    updated_at: float
    status: BatchStatus
    owner: str | None


class EndedBatches(NamedTuple):
    """A viewer's batches that have ended, at one moment."""

    newest: Sequence[EndedBatch]
    """The newest first."""
    counts: Counter[BatchStatus]
    ids: frozenset[str]
    """Of those that were asked for."""


class BatchStore:
    """Reads and writes records. For any thread; every call may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._ended = ByCreation[EndedBatch]()
        self._counts: dict[str | None, Counter[BatchStatus]] = defaultdict(Counter)
        """Of those that have ended, by owner."""
        self._records: OrderedDict[str, BatchRecord] = OrderedDict()
        """Of ended batches, the last one that was asked for at the end."""
        self._broken: set[str] = set()

    @staticmethod
    def new_id() -> str:
        """An id that no batch has."""
        return f"batch_{secrets.token_hex(16)}"

    def folder(self, batch_id: str) -> str:
        """The folder of a batch."""
        return f"{self._folder}/{batch_id}"

    def _in(self, batch_id: str, name: str) -> str:
        return f"{self.folder(batch_id)}/{name}"

    def create(self, record: BatchRecord) -> None:
        """Store a new batch, atomically."""
        unfinished = self.folder(UNFINISHED + record.id)
        try:
            os.mkdir(unfinished, mode=0o700)
            os.close(_open(f"{unfinished}/{LOCK}"))
            write_atomically(f"{unfinished}/{RECORD}", _serialised(record))
            sync_folder(unfinished)
            os.rename(unfinished, self.folder(record.id))
            sync_folder(self._folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def save(self, record: BatchRecord) -> None:
        """Replace a record. For whoever holds the batch's lock."""
        write_atomically(self._in(record.id, RECORD), _serialised(record))

    def get(self, batch_id: str, viewer: Viewer = EVERYONE) -> BatchRecord:
        """A batch of the viewer.

        Raises:
            NoSuchBatch: there is none of this id, whatever the id looks like, its record cannot be read, or it is
                somebody else's.
        """
        record = self._read(batch_id) if BATCH_ID.fullmatch(batch_id) else None
        if record is None or not viewer.sees(record.owner):
            raise _none_of(batch_id)
        return record

    def open(self) -> list[BatchRecord]:
        """All batches that have not ended, the oldest first. Reads these, and what has ended since the last call."""
        names = [name for name in os.listdir(self._folder) if BATCH_ID.fullmatch(name)]
        self._forget_all_but(names)
        found = [record for name in names if name not in self._ended and (record := self._read(name)) is not None]
        return sorted(
            (record for record in found if not record.ended), key=lambda record: (record.created_at, record.id)
        )

    def ended(self, viewer: Viewer = EVERYONE, among: Iterable[str] = ()) -> EndedBatches:
        """The viewer's batches that had ended when `open` was last called; which of those `among` these ids. Reads no
        disk, and takes hardly longer where there are many."""
        with self._lock:
            newest = self._ended.newest(viewer)
            counts = sum((each for owner, each in self._counts.items() if viewer.sees(owner)), Counter[BatchStatus]())
            found = [each for batch_id in among if (each := self._ended.get(batch_id)) is not None]
        return EndedBatches(newest, counts, frozenset(each.id for each in found if viewer.sees(each.owner)))

    def records(self, batch_ids: Iterable[str]) -> list[BatchRecord]:
        """The records of these batches, without those that are gone."""
        return [record for batch_id in batch_ids if (record := self._read(batch_id)) is not None]

    def lock(self, batch_id: str) -> BatchLock | None:
        """The lock of whoever runs a batch; None if it is taken."""
        path = self._in(batch_id, LOCK)
        lock = FileLock.take(path)
        return None if lock is None else BatchLock(path, lock)

    def cancel(self, batch_id: str, now: float) -> None:
        """Request that whoever runs the batch cancels it.

        Raises:
            NoSuchBatch: it was deleted meanwhile.
        """
        if self.cancel_requested_at(batch_id) is not None:
            return
        try:
            write_atomically(self._in(batch_id, CANCEL), repr(now).encode())
        except FileNotFoundError:
            raise _none_of(batch_id) from None

    def cancel_requested_at(self, batch_id: str) -> float | None:
        """When cancellation was requested; None if it was not."""
        try:
            return float(read_whole(self._in(batch_id, CANCEL)))
        except (FileNotFoundError, ValueError):
            return None

    def note_work(self, batch_id: str, note: WorkNote) -> None:
        """Record on disk which lines are about to be run. For the holder of the batch's lock, as the next two."""
        write_atomically(self._in(batch_id, WORKING), note.model_dump_json().encode())

    def noted_work(self, batch_id: str) -> WorkNote | None:
        """The lines that a process was running when it died; None if none did."""
        try:
            return WorkNote.model_validate_json(read_whole(self._in(batch_id, WORKING)))
        except (FileNotFoundError, ValidationError):
            return None

    def end_work(self, batch_id: str) -> None:
        """Remove the note: nothing is being run any more."""
        delete(self._in(batch_id, WORKING))

    def forget(self, batch_id: str) -> None:
        """Delete a batch with all that is its own."""
        self._drop(batch_id)
        shutil.rmtree(self.folder(batch_id), ignore_errors=True)

    def sweep(self) -> None:
        """Delete what interrupted writes have left."""
        delete_unfinished(self._folder, "batch_*/")
        for path in self._folder.glob(UNFINISHED + "*"):
            if abs(time() - path.stat().st_mtime) > UNFINISHED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, batch_id: str) -> BatchRecord | None:
        """The record; None if it is gone or broken. That of an ended batch does not change."""
        path = self._in(batch_id, RECORD)
        try:
            if (known := self._records.get(batch_id)) is not None:  # another thread may forget it meanwhile
                os.stat(path)
                self._keep(known)
                return known
            record = BatchRecord.model_validate_json(read_whole(path))
        except FileNotFoundError:
            self._drop(batch_id)
            return None
        except ValidationError as error:
            if batch_id not in self._broken:
                logger.error("%s cannot be read (%d faults): this batch is left out", path, error.error_count())
            self._broken.add(batch_id)
            return None
        if record.ended:
            self._keep(record)
        return record

    def _keep(self, record: BatchRecord) -> None:
        with self._lock:
            if record.id not in self._ended:
                owner = record.owner and intern(record.owner)  # one string for all batches of an owner
                self._ended.add(EndedBatch(record.created_at, record.id, record.updated_at, record.status, owner))
                self._counts[owner][record.status] += 1
            self._records[record.id] = record
            self._records.move_to_end(record.id)
            if len(self._records) > KEPT_RECORDS:
                self._records.popitem(last=False)

    def _drop(self, batch_id: str) -> None:
        with self._lock:
            self._records.pop(batch_id, None)
            if (ended := self._ended.remove(batch_id)) is not None:
                self._counts[ended.owner][ended.status] -= 1

    def _forget_all_but(self, batch_ids: Sequence[str]) -> None:
        """Whatever deleted the others: another server may have."""
        with self._lock:
            gone = self._ended.others(set(batch_ids))
        for batch_id in gone:
            self._drop(batch_id)
        self._broken.intersection_update(batch_ids)


class LockLost(Exception):
    """Another server runs the batch by now."""


class BatchLock:
    """Held by whoever runs a batch. A machine that was cut off from a network's files may have lost it unnoticed.

    Whoever takes it writes a name into the file, and whoever wants to write for the batch looks for the own name first.
    Opening the file asks the server of a network's files for what is in it now.
    """

    def __init__(self, path: str, lock: FileLock) -> None:
        """Raises OSError."""
        self._path, self._lock = path, lock
        self._name = secrets.token_hex(8).encode()
        try:
            lock.sign(self._name)
        except OSError:
            lock.release()
            raise

    def check(self) -> None:
        """
        Raises:
            LockLost: another server has it, or the batch was deleted. OSError: it cannot be looked at.
        """
        try:
            held = read_whole(self._path) == self._name
        except FileNotFoundError:
            held = False
        if not held:
            raise LockLost

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


def _none_of(batch_id: str) -> NoSuchBatch:
    return NoSuchBatch(f"There is no batch {batch_id[:100]!r}.")


def _serialised(record: BatchRecord) -> bytes:
    return record.model_dump_json().encode()


OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"


class AnswerFiles:
    """The output and errors of one batch: files that only grow, and are cut back to what the record says.

    For one thread at a time; every call may raise OSError.
    """

    def __init__(self, folder: str) -> None:
        self._output = _open(f"{folder}/{OUTPUT}")
        self._errors = _open(f"{folder}/{ERRORS}")

    def holds(self, progress: BatchProgress) -> bool:
        """Whether the files have all that the record says: a disk that failed may have lost some."""
        sizes = os.fstat(self._output).st_size, os.fstat(self._errors).st_size
        return sizes[0] >= progress.output_bytes and sizes[1] >= progress.error_bytes

    def append(self, progress: BatchProgress, output: bytes, errors: bytes) -> None:
        """Write after what is recorded, over whatever is there, and sync it to disk."""
        for file, start, data in (
            (self._output, progress.output_bytes, output),
            (self._errors, progress.error_bytes, errors),
        ):
            if data or os.fstat(file).st_size != start:
                os.ftruncate(file, start)
                _write(file, start, data)
                os.fdatasync(file)

    def close(self) -> None:
        """Close the files."""
        os.close(self._output)
        os.close(self._errors)


def answered_lines(batch_id: str, lines: Sequence[InputLine], results: Sequence[LineResult]) -> tuple[bytes, bytes]:
    """The lines of the output and those of the errors."""
    output: list[bytes] = []
    errors: list[bytes] = []
    for line, result in zip(lines, results, strict=True):
        (output if result.ok else errors).append(_answered(batch_id, line, result))
    return b"".join(output), b"".join(errors)


def expired_lines(batch_id: str, lines: Iterable[InputLine]) -> bytes:
    """The error lines for lines that were not run in time."""
    return _unanswered(
        batch_id,
        lines,
        "batch_expired",
        "This request was not run before the completion window of its batch was over.",
    )


def process_died_lines(batch_id: str, lines: Iterable[InputLine]) -> bytes:
    """The error lines for lines that have killed the process and are not run again."""
    return _unanswered(
        batch_id,
        lines,
        "process_died",
        "The server's process died twice while it worked on this request, the second time on nothing else; it was not "
        "tried again. Send less text in one request.",
    )


def _unanswered(batch_id: str, lines: Iterable[InputLine], code: str, message: str) -> bytes:
    error = {"code": code, "message": message}
    return b"".join(
        orjson.dumps(
            {"id": _id(batch_id, line), "custom_id": line.custom_id, "response": None, "error": error},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for line in lines
    )


def _answered(batch_id: str, line: InputLine, result: LineResult) -> bytes:
    request_id = _id(batch_id, line)
    response: dict[str, object] = {"status_code": result.status, "request_id": request_id}
    if result.hint:
        response["hint"] = result.hint
    response["body"] = orjson.Fragment(result.body)
    return orjson.dumps(
        {"id": request_id, "custom_id": line.custom_id, "response": response, "error": None},
        option=orjson.OPT_APPEND_NEWLINE,
    )


def _id(batch_id: str, line: InputLine) -> str:
    """Unique, and the same when the line has to be run again."""
    return f"batch_req_{batch_id[6:]}{line.number:08x}"


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)


def _write(file: int, start: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, start)
        view, start = view[count:], start + count
