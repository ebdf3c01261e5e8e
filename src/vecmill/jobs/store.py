"""How the queue changes what is kept, whoever keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from vecmill.config import JobSettings
from vecmill.core.errors import VecmillError
from vecmill.jobs.book import Book
from vecmill.jobs.ledger import Ledger
from vecmill.jobs.views import Views

T = TypeVar("T")

Work = Callable[[Book], Callable[[Views], T]]
"""Changes a book, or raises before it has; then reads the answer from what the book has become."""


class JobStore(Protocol):
    """The jobs, kept somewhere."""

    ledger: Ledger
    """As it was last seen here."""

    @property
    def problem(self) -> str | None:
        """Why the jobs cannot be kept now, as a sentence; None where they can."""
        ...

    async def open(self) -> None:
        """Find what is kept. Raises nothing: what cannot be read now is read later."""
        ...

    def now(self) -> float:
        """Unix time by the clock of leases."""
        ...

    async def transact(self, work: Work[T]) -> T:
        """Change the jobs; kept when it returns. One at a time.

        Raises:
            JobsUnavailable: nothing is known to be changed. And whatever `work` raises.
        """
        ...

    async def close(self) -> None:
        """Let go of what is kept."""
        ...


def attempt(book: Book, settings: JobSettings, work: Work[T]) -> tuple[Ledger, Callable[[], T]]:
    """What is due by itself, then the work: what the book becomes, and its answer (or error) for when that is kept.

    An error of the work undoes nothing of what was due.
    """
    book.tick()
    refusal: VecmillError | None = None
    answer: Callable[[Views], T] | None = None
    try:
        answer = work(book)
    except VecmillError as error:
        refusal = error
    ledger = book.ledger()

    def answered() -> T:
        if answer is None:
            raise refusal or AssertionError("work neither answered nor raised")
        return answer(Views(ledger, settings, book.now))

    return ledger, answered
