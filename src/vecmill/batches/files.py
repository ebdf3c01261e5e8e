"""Files that clients send and that batches write: `<id>.data`, and `<id>.json` once it is complete."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from sys import intern
from threading import Lock
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from vecmill.batches.disk import FileQuota
from vecmill.batches.known import ByCreation
from vecmill.core.clock import Clock
from vecmill.core.errors import BodyTooLarge, NoSuchFile
from vecmill.core.types import EVERYONE, Viewer
from vecmill.storage.files import (
    TEMPORARY,
    FileLock,
    delete,
    delete_unfinished,
    read_whole,
    sync_folder,
    write_atomically,
)

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
DATA, PART, METADATA = ".data", ".part", ".json"
DAY = 86_400.0


class StoredFile(BaseModel):
    """What is known of a file. Times are Unix times in seconds."""

    model_config = ConfigDict(frozen=True)

    id: str
    bytes: int
    created_at: float
    expires_at: float
    filename: str
    purpose: Literal["batch", "batch_output"]
    owner: str | None = None
    """The key that sent it, or had it made; None: there were no keys, or it was before files had owners."""


class KnownFile(NamedTuple):
    """What is kept in memory of a file, some 300 bytes; its description is on disk."""

    created_at: float
    id: str
    expires_at: float
    purpose: str
    owner: str | None


class FileStore:
    """The folder of files. For any thread; every call may raise OSError."""

    def __init__(self, folder: Path, clock: Clock, quota: FileQuota, expires_days: float) -> None:
        self._folder = folder
        self._clock = clock
        self._expires_seconds = expires_days * DAY
        self._lock = Lock()
        self._known = ByCreation[KnownFile]()
        self.quota = quota

    @staticmethod
    def new_id() -> str:
        """An id that no file has."""
        return f"file-{secrets.token_hex(16)}"

    def part(self, file_id: str) -> str:
        """Where a file is written before it is whole."""
        return self._place(file_id + PART)

    def data(self, file_id: str) -> str:
        """Where a whole file is."""
        return self._place(file_id + DATA)

    def _place(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def add(
        self,
        file_id: str,
        written: str,
        size: int,
        *,
        filename: str,
        purpose: Literal["batch", "batch_output"],
        expires_seconds: float | None = None,
        owner: str | None = None,
    ) -> StoredFile:
        """Take over a file written under another name. Can be repeated after a crash at any point."""
        if os.path.exists(written):
            os.replace(written, self.data(file_id))
        now = self._clock()
        expires_at = now + (self._expires_seconds if expires_seconds is None else expires_seconds)
        file = StoredFile(
            id=file_id,
            bytes=size,
            created_at=now,
            expires_at=expires_at,
            filename=filename,
            purpose=purpose,
            owner=owner,
        )
        write_atomically(self._metadata(file_id), file.model_dump_json().encode())
        sync_folder(self._folder)
        return file

    def get(self, file_id: str, viewer: Viewer = EVERYONE) -> StoredFile:
        """A whole file of the viewer that has not expired.

        Raises:
            NoSuchFile: there is none of this id, whatever the id looks like, or it is somebody else's.
        """
        file = self._read(file_id) if FILE_ID.fullmatch(file_id) else None
        if file is None or file.expires_at <= self._clock() or not viewer.sees(file.owner):
            raise NoSuchFile(f"There is no file {file_id[:100]!r}: it was deleted, has expired, or never was.")
        return file

    def size(self, file_id: str) -> int | None:
        """Bytes of a whole file; None where there is none, or it cannot be looked at now. Raises nothing."""
        try:
            return os.stat(self.data(file_id)).st_size
        except OSError:
            return None

    def ids(self, viewer: Viewer = EVERYONE, purpose: str | None = None) -> list[str]:
        """The ids of all whole files of the viewer, or of those with a purpose, that have not expired; the newest
        first. Reads those that were added since the last call."""
        now = self._clock()
        return [
            file.id
            for file in self.known(viewer)
            if file.expires_at > now and (purpose is None or file.purpose == purpose)
        ]

    def described(self, file_ids: Iterable[str]) -> list[StoredFile]:
        """These files, without those that are gone."""
        return [file for file_id in file_ids if (file := self._read(file_id)) is not None]

    def known(self, viewer: Viewer = EVERYONE) -> list[KnownFile]:
        """All complete files of the viewer, the newest first, including expired ones that are not deleted yet."""
        ids = {name.removesuffix(METADATA) for name in os.listdir(self._folder) if name.endswith(METADATA)}
        with self._lock:
            for gone in self._known.others(ids):  # another server may have deleted it
                self._known.remove(gone)
            new = [file_id for file_id in ids if file_id not in self._known]
        for file_id in filter(FILE_ID.fullmatch, new):
            self._read(file_id)
        with self._lock:
            return self._known.newest(viewer)

    def delete(self, file_id: str) -> None:
        """Delete a file; one that is not there is no error."""
        self._forget(file_id)
        # The metadata first: a file without it is none.
        for path in (self._metadata(file_id), self.data(file_id)):
            delete(path)
        self.quota.forget()

    def sweep(self, orphans: Mapping[str, list[str]], in_use: Collection[str]) -> None:
        """Delete what has expired, and `orphans`, but nothing that a batch needs."""
        for file in self.known():
            if file.expires_at <= self._clock() and file.id not in in_use:
                self.delete(file.id)
        for file_id, names in orphans.items():
            if file_id not in in_use:
                self._delete_orphan(file_id, names)
        delete_unfinished(self._folder)

    def orphans(self) -> dict[str, list[str]]:
        """Names of files without metadata, by file id."""
        orphans: dict[str, list[str]] = {}
        names = set(os.listdir(self._folder))
        for name in names:
            file_id = name.partition(".")[0]
            if file_id + METADATA not in names:
                orphans.setdefault(file_id, []).append(name)
        return orphans

    def _delete_orphan(self, file_id: str, names: list[str]) -> None:
        """Whoever writes a file holds a lock on it until its metadata is there."""
        content = [self._place(name) for name in names if name.endswith((PART, DATA))]
        locks = [FileLock.take(path) for path in content]
        try:
            if locks and None not in locks and not os.path.exists(self._metadata(file_id)):
                # The content last: what is left without it would be left for good.
                unwritten = [self._place(name) for name in names if name.endswith(TEMPORARY)]
                for path in (*unwritten, *content):
                    delete(path)
        finally:
            for lock in filter(None, locks):
                lock.release()

    def _metadata(self, file_id: str) -> str:
        return self._place(file_id + METADATA)

    def _read(self, file_id: str) -> StoredFile | None:
        """The file; None if there is none, or its metadata is broken. Metadata never changes."""
        try:
            file = StoredFile.model_validate_json(read_whole(self._metadata(file_id)))
        except (FileNotFoundError, ValidationError):
            self._forget(file_id)
            return None
        owner = file.owner and intern(file.owner)  # one string for all files of an owner
        with self._lock:
            if file_id not in self._known:
                self._known.add(KnownFile(file.created_at, file_id, file.expires_at, file.purpose, owner))
        return file

    def _forget(self, file_id: str) -> None:
        with self._lock:
            self._known.remove(file_id)


class Upload:
    """A file that is being received. For one thread at a time; every call may raise OSError."""

    def __init__(self, files: FileStore, max_bytes: int, owner: str | None = None) -> None:
        self._files = files
        self._owner = owner
        self._max_bytes = max_bytes
        self._id = files.new_id()
        self._path = files.part(self._id)
        self._file = _opened(self._path)
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            BodyTooLarge: the file is too large. FilesFull: all files together are.
        """
        if self.size + len(data) > self._max_bytes:
            raise too_large(self._max_bytes)
        self._files.quota.take(len(data))
        self._file.write(data)
        self.size += len(data)

    def finish(self, filename: str, expires_seconds: float | None) -> StoredFile:
        """Sync it to disk and add it to the store."""
        self._file.flush()
        os.fsync(self._file.fileno())
        file = self._files.add(
            self._id,
            self._path,
            self.size,
            filename=filename,
            purpose="batch",
            expires_seconds=expires_seconds,
            owner=self._owner,
        )
        self._file.close()
        return file

    def discard(self) -> None:
        """Delete it, unless it is finished. Never raises."""
        if self._file.closed:
            return
        for path in (self._path, self._files.data(self._id)):
            with suppress(OSError):
                os.unlink(path)
        with suppress(OSError):  # what is still to be flushed may not fit
            self._file.close()
        self._files.quota.forget()


def _opened(path: str) -> BufferedWriter:
    """A new file, locked until it is closed: an unlocked file without metadata is deleted as an orphan."""
    while True:
        file = open(path, "wb")  # noqa: SIM115 - it stays open: the caller closes it
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(path):
            return file
        file.close()  # it was deleted before it was locked


def too_large(max_bytes: int) -> BodyTooLarge:
    """The error for a file above MAX_FILE_BYTES."""
    return BodyTooLarge(
        f"The file is larger than {max_bytes} bytes (MAX_FILE_BYTES): split it into several, each with a batch of its "
        f"own."
    )
