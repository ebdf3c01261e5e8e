"""Vectors in one SQLite file, the least recently used dropped first.

The first eight bytes of a key are the row's number, so that a look-up walks one tree; the other eight tell apart keys
that begin alike. `used` counts the writes: the machine's clock may be set back.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vecmill.core.protocols import StoreFailed, StoreSize
from vecmill.storage.sqlite import connect, is_broken, open_database, set_aside, transaction

logger = logging.getLogger(__name__)

VERSION = 1
SCHEMA = """
CREATE TABLE vectors (id INTEGER PRIMARY KEY, rest INTEGER NOT NULL, used INTEGER NOT NULL, value BLOB NOT NULL);
CREATE INDEX vectors_by_use ON vectors (used)
"""
INSERT = "INSERT OR IGNORE INTO vectors (id, rest, used, value) VALUES (?, ?, ?, ?)"
BUSY_SECONDS = 0.5  # for another program at the file; rather compute than wait long
KEYS_AT_A_TIME = 256  # of one statement
DROPPED_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class _Reader:
    """One thread's connection."""

    connection: sqlite3.Connection
    generation: int
    """Of the file that it is to."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        with self.lock:
            self.connection.close()


class SqliteVectors:
    """One writer at a time; readers in as many threads as come, none of which waits for it."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """`max_bytes` are of the file, which is opened when it is first used."""
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._local = threading.local()
        self._readers: list[_Reader] = []
        self._writer: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        """Which file the writer's is."""
        self._entries = self._writes = self._generation = 0

    def _open(self) -> sqlite3.Connection:
        with self._lock:
            if self._writer is not None and self._file != _identity(self._path):
                # SQLite would go on with a file that nobody can find any more.
                logger.error(
                    "%s was removed or replaced: the cache goes on with the file that is there now", self._path
                )
                with suppress(sqlite3.Error):
                    self._writer.close()
                self._writer = None
            if self._writer is None:
                self._writer = open_database(self._path, SCHEMA, VERSION, busy_seconds=BUSY_SECONDS)
                self._file = _identity(self._path)
                [(self._entries, last)] = self._writer.execute("SELECT count(*), max(used) FROM vectors")
                self._writes = last or 0
                self._generation += 1
            return self._writer

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn the errors of SQLite and of the disk into ours, and memory that SQLite does not get.

        A broken file is put aside; the next call begins a new one.
        """
        generation = self._generation
        try:
            yield
        except sqlite3.Error as error:
            if is_broken(error):
                self._begin_anew(str(error), generation)
            raise StoreFailed(str(error)) from None
        except (OSError, MemoryError) as error:
            raise StoreFailed(str(error) or "out of memory") from None

    def _begin_anew(self, reason: str, generation: int) -> None:
        with self._lock, suppress(OSError):
            if generation != self._generation or self._writer is None:
                return  # another thread has seen to it
            with suppress(sqlite3.Error):
                self._writer.close()
            self._writer = None
            set_aside(self._path, reason)

    def get(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """Those of the keys that are there. Raises StoreFailed."""
        values: dict[bytes, bytes] = {}
        with self._failing(), self._reader() as reader:
            for start in range(0, len(keys), KEYS_AT_A_TIME):
                self._get_part(reader, keys[start : start + KEYS_AT_A_TIME], values)
        return values

    def _get_part(self, reader: sqlite3.Connection, keys: Sequence[bytes], values: dict[bytes, bytes]) -> None:
        by_id = dict(zip(_numbers(keys), keys, strict=True))
        marks = ",".join("?" * len(by_id))
        rows = reader.execute(f"SELECT id, rest, value FROM vectors WHERE id IN ({marks})", tuple(by_id))  # noqa: S608
        for number, rest, value in rows:
            key = by_id[number]
            if rest == int.from_bytes(key[8:], "little", signed=True):
                values[key] = value

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection to the present file; its lock keeps `close` from taking it away meanwhile."""
        if self._writer is None:
            self._open()
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None or reader.generation != self._generation:
            if reader is not None:
                reader.close()
            reader = self._local.reader = _Reader(connect(self._path, busy_seconds=BUSY_SECONDS), self._generation)
            self._readers.append(reader)
        with reader.lock:
            yield reader.connection

    def put(self, entries: Mapping[bytes, bytes], used: Iterable[bytes]) -> int:
        """Add entries, note which others were used, drop the least recently used. Raises StoreFailed."""
        with self._lock, self._failing():
            writer = self._open()
            self._writes += 1
            marks = [(self._writes, number) for number in _numbers(list(used))]
            with transaction(writer):
                writer.executemany("UPDATE vectors SET used = ? WHERE id = ?", marks)
                coming = sum(map(len, entries.values()))
                nearly_full = _bytes(writer) + 2 * coming > self._max_bytes  # pages are not filled to the brim
                dropped = self._drop(writer, coming) if nearly_full else 0
                added = writer.executemany(INSERT, self._rows(entries)).rowcount
                dropped += self._drop(writer) if nearly_full else 0
            self._entries += max(0, added) - dropped
            return dropped

    def _rows(self, entries: Mapping[bytes, bytes]) -> list[tuple[int, int, int, bytes]]:
        numbers = _numbers(list(entries))
        return [
            (number, int.from_bytes(key[8:], "little", signed=True), self._writes, value)
            for number, (key, value) in zip(numbers, entries.items(), strict=True)
        ]

    def _drop(self, writer: sqlite3.Connection, coming: int = 0) -> int:
        dropped = 0
        while _bytes(writer) + coming > self._max_bytes:
            gone = writer.execute(
                "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY used LIMIT ?)", (DROPPED_AT_A_TIME,)
            ).rowcount
            if gone <= 0:
                break
            dropped += gone
        return dropped

    def clear(self) -> int:
        """Drop everything and give the disk back. Raises StoreFailed: nothing was dropped."""
        with self._lock:
            with self._failing():
                writer = self._open()
                with transaction(writer):
                    dropped = writer.execute("DELETE FROM vectors").rowcount
                self._entries = 0
            # To copy the file needs room that a full disk does not have. The entries are gone either way.
            try:
                with self._failing():
                    writer.execute("VACUUM")
                    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except StoreFailed as error:
                logger.warning("the cache is empty, but its file %s could not be made smaller: %s", self._path, error)
            return dropped

    def size(self) -> StoreSize:
        """How much is there. Raises StoreFailed."""
        with self._lock, self._failing():
            return StoreSize(self._entries, _bytes(self._open()))

    def close(self) -> None:
        """Close every connection, once no thread uses one; the last writes the log back into the file."""
        with self._lock:
            for reader in self._readers:
                reader.close()
            self._readers.clear()
            if self._writer is not None:
                self._writer.close()
                self._writer = None


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file at a path; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _bytes(connection: sqlite3.Connection) -> int:
    """What the file's used pages take."""
    size, pages, free = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
    )
    return int(size * (pages - free))


def _numbers(keys: Sequence[bytes]) -> list[int]:
    """The first eight bytes of each key, as SQLite's integers."""
    numbers: list[int] = np.frombuffer(b"".join([key[:8] for key in keys]), "<i8").tolist()
    return numbers
