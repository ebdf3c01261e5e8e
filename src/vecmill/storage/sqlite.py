"""Opening a SQLite database so that it survives a crash, and putting aside one that did not.

Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/howtocorrupt.html
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time_ns

from vecmill.storage.files import PRIVATE

logger = logging.getLogger(__name__)

BUSY_SECONDS = 5.0
# Errors that say that the file itself is no good, not that it cannot be used now.
BROKEN = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_ERROR})


def connect(path: Path, *, durable: bool = False, busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    """A connection in WAL mode without implicit transactions, for any thread, one at a time.

    What is committed survives the death of the process; where `durable`, also that of the machine.
    """
    with suppress(OSError):  # its log gets the same rights; where it cannot be made, SQLite says why
        path.touch(PRIVATE, exist_ok=False)
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    except BaseException:
        connection.close()
        raise
    return connection


def open_database(
    path: Path, schema: str, version: int, *, durable: bool = False, busy_seconds: float = BUSY_SECONDS
) -> sqlite3.Connection:
    """Connect, and create the tables of `schema` in a new file.

    A file that is broken, or of an older version, is put aside under another name and a new one begun.

    Raises:
        sqlite3.Error: the database cannot be used now (locked, read-only, no room).
        OSError: it is broken and cannot be put aside (a read-only disk), or it is of a newer version.
    """
    try:
        return _prepared(path, schema, version, durable, busy_seconds)
    except sqlite3.Error as error:
        if not is_broken(error):
            raise
        set_aside(path, str(error))
    return _prepared(path, schema, version, durable, busy_seconds)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that the block writes, or nothing of it, whatever ends the block: out of memory, Ctrl-C, a bug."""
    if connection.in_transaction:  # a rollback that failed itself: `BEGIN` would be taken for a broken file
        connection.rollback()
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A transaction that stays open keeps every other connection from writing.
        with suppress(sqlite3.Error, MemoryError):
            connection.rollback()
        raise


def is_broken(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is no database, or not one of ours."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in BROKEN


def set_aside(path: Path, reason: str) -> None:
    """Give a database and its log another name, so that somebody may still look at them."""
    aside = path.with_name(f"{path.name}.aside-{time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    logger.error("%s cannot be read (%s): it was put aside as %s, and a new one begun", path, reason, aside.name)


def _prepared(path: Path, schema: str, version: int, durable: bool, busy_seconds: float) -> sqlite3.Connection:
    connection = connect(path, durable=durable, busy_seconds=busy_seconds)
    try:
        [stored] = connection.execute("PRAGMA user_version").fetchone()
        if stored == 0:
            connection.executescript(f"BEGIN; {schema}; PRAGMA user_version = {version}; COMMIT;")
        elif stored > version:
            raise OSError(f"{path} is of format {stored}, written by a newer vecmill; this one reads {version}")
        elif stored < version:
            connection.close()
            set_aside(path, f"it is of version {stored}, this vecmill writes {version}")
            return _prepared(path, schema, version, durable, busy_seconds)
    except BaseException:
        connection.close()
        raise
    return connection
