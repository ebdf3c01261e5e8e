"""The jobs of one server in a SQLite file of its own. Knows records, not what is in them."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vecmill.core.errors import JobsUnavailable, WorkLost
from vecmill.core.protocols import JobChanges, StoredJobs
from vecmill.core.threads import LastingThreads
from vecmill.storage.sqlite import is_broken, open_database, set_aside, transaction

VERSION = 1
SCHEMA = """
CREATE TABLE open (id TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE ended (number INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), value BLOB NOT NULL)
"""
MAGIC = b"SQLite format 3\0"
# A client's patience with /jobs is 5 s, and its call may wait for another's.
BUSY_SECONDS = 0.5
# Transient errors: keep the connection and retry.
TRANSIENT = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL})

T = TypeVar("T")


class SqliteJobs:
    """One connection in one thread, so that the event loop never waits for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._file: int | None = None
        self._thread = LastingThreads(1, "jobs")

    async def load(self) -> StoredJobs:
        """All that is stored; nothing where the file was broken and had to be put aside.

        Raises:
            JobsUnavailable: it cannot be read now.
        """
        return await self._run(self._load)

    async def save(self, changes: JobChanges) -> bool:
        """Write all or nothing; False: the file is a new one and has nothing of what was saved before.

        Raises:
            JobsUnavailable: it cannot be written now.
        """
        return await self._run(lambda: self._save(changes))

    async def close(self) -> None:
        """Close the file. Raises nothing."""
        with suppress(JobsUnavailable):
            await self._run(self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError, MemoryError, WorkLost) as error:
            reason = str(error) or type(error).__name__
            raise JobsUnavailable(f"The jobs' database {self._path} cannot be used ({reason}).") from None

    def _load(self) -> StoredJobs:
        try:
            return self._read(self._opened())
        except sqlite3.Error as error:
            if not is_broken(error):
                raise
            self._begin_anew(str(error))
        return self._read(self._opened())

    def _read(self, connection: sqlite3.Connection) -> StoredJobs:
        opened = dict(connection.execute("SELECT id, record FROM open"))
        ended = [record for (record,) in connection.execute("SELECT record FROM ended ORDER BY number")]
        meta = connection.execute("SELECT value FROM meta").fetchone()
        return StoredJobs(opened, ended, meta[0] if meta else None)

    def _save(self, changes: JobChanges) -> bool:
        if self._connection is None and not changes.whole:
            return False
        if self._connection is not None and not self._is_ours():
            self._begin_anew("another file has taken its place")
            return False
        try:
            self._write(self._opened(), changes)
        except sqlite3.Error as error:
            if is_broken(error):
                self._begin_anew(str(error))
                return False
            if error.sqlite_errorcode & 0xFF not in TRANSIENT:
                self._close()
            raise
        return True

    def _write(self, connection: sqlite3.Connection, changes: JobChanges) -> None:
        with transaction(connection):
            if changes.whole:
                connection.execute("DELETE FROM open")
                connection.execute("DELETE FROM ended")
            connection.executemany("INSERT OR REPLACE INTO open VALUES (?, ?)", changes.open.items())
            connection.executemany("DELETE FROM open WHERE id = ?", ((job_id,) for job_id in changes.closed))
            connection.executemany("INSERT OR REPLACE INTO ended VALUES (?, ?)", changes.ended)
            connection.execute("DELETE FROM ended WHERE number <= ?", (changes.forgotten,))
            connection.execute("INSERT OR REPLACE INTO meta VALUES (1, ?)", (changes.meta,))

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = open_database(self._path, SCHEMA, VERSION, durable=True, busy_seconds=BUSY_SECONDS)
            # Kept open beside the connection: closing it would take SQLite's locks away
            # (https://www.sqlite.org/howtocorrupt.html, 2.2).
            try:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _is_ours(self) -> bool:
        """Whether the path still leads to the file that is open, and that is still a database.

        SQLite does not look: it goes on with the pages that it has in memory.
        """
        if self._file is None:
            return False
        try:
            same = os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False
        return same and os.pread(self._file, len(MAGIC), 0) == MAGIC

    def _begin_anew(self, reason: str) -> None:
        self._close()
        set_aside(self._path, reason)

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        if self._file is not None:
            os.close(self._file)
        self._connection = self._file = None
