"""Jobs of one server: in memory, and written to a database of its own where there is one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from vecmill.config import JobSettings
from vecmill.core.clock import Clock
from vecmill.core.errors import JobsUnavailable
from vecmill.jobs.state import Book, Ledger, T, TransactionResult, attempt, changes, decode, joined
from vecmill.storage.sqlite_jobs import SqliteJobs

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# The queue looks every second. If nobody has for this long, the process was stopped (SIGSTOP, a frozen container) or
# had no processor, and no client could report: every lease is renewed.
GAP_SECONDS = 5.0


class LocalJobs:
    """Memory has the truth. A database that fails is retried, and then gets what it missed."""

    def __init__(self, settings: JobSettings, database: SqliteJobs | None = None, clock: Clock | None = None) -> None:
        self.ledger = Ledger()
        self._settings = settings
        self._database = database
        self._clock = clock or Clock()
        self._loaded = database is None
        self._saved: Ledger | None = None  # what the database holds, as far as known
        self._failed_at: float | None = None
        self._transacted_at = monotonic()
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Read what is stored."""
        async with self._lock:
            await self._keep()

    @property
    def problem(self) -> str | None:
        """Why the jobs do not outlive the process; None where they do."""
        if self._failed_at is None:
            return None
        return "The jobs' database cannot be used; they are kept in memory until it can."

    def now(self) -> float:
        """Unix time by the clock of leases."""
        return self._clock()

    async def transact(self, change: Callable[[Book], T]) -> TransactionResult[T]:
        """Change the jobs; written when it returns, unless the database cannot be used now."""
        async with self._lock:
            if not self._loaded:
                await self._keep()
            book = Book(self.ledger, self._settings, self._clock())
            before, self._transacted_at = self._transacted_at, monotonic()
            if self._transacted_at - before > GAP_SECONDS:
                book.resume()
            outcome = attempt(book, change)
            self.ledger = outcome.ledger
            await self._keep()
        return outcome

    async def close(self) -> None:
        """Write what is missing and close the database."""
        async with self._lock:
            self._failed_at = None
            await self._keep()
            if self._database is not None:
                await self._database.close()
                self._database = None

    async def _keep(self) -> None:
        """Bring the database up to date. While it fails, it is tried once in RETRY_SECONDS."""
        if self._database is None or (self._failed_at is not None and self._clock() < self._failed_at + RETRY_SECONDS):
            return
        try:
            if not self._loaded:
                await self._load(self._database)
            await self._save(self._database)
        except JobsUnavailable as error:
            if self._failed_at is None:
                logger.error("%s Jobs are kept in memory until it can be used.", error.message)
            self._failed_at = self._clock()
        else:
            if self._failed_at is not None:
                logger.warning("the jobs are written to the database again")
            self._failed_at = None

    async def _load(self, database: SqliteJobs) -> None:
        """Read the database. Its jobs come before those registered while it could not be read."""
        stored = decode(await database.load())
        self._clock.reach(stored.latest)
        self._saved = stored
        book = Book(joined(stored, self.ledger), self._settings, self._clock())
        book.resume()
        self.ledger = book.ledger()
        self._loaded = True

    async def _save(self, database: SqliteJobs) -> None:
        ledger = self.ledger
        missing = changes(self._saved, ledger, leases=False)
        if missing is not None and not await database.save(missing):
            self._saved = None
            whole = changes(None, ledger, leases=False)
            if whole is not None and not await database.save(whole):
                raise JobsUnavailable("The database of jobs broke twice in a row.")
        self._saved = ledger
