"""How much may be in progress. A request is admitted whole, before any work is done for it, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from vecmill.core.errors import Overloaded

LONGEST_RETRY_AFTER = 60  # seconds; SDKs give up when told to wait for minutes


@dataclass(slots=True)
class Permit:
    """Room for one request, in tokens: reserved by estimate, settled once they are counted."""

    tokens: int
    settle: Callable[[int], None]


class Admission:
    """Counts requests and tokens admitted and not yet answered. Belongs to the event loop's thread."""

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        tokens_per_second: Callable[[], float],
        check_memory: Callable[[int], None] = lambda needed: None,
    ) -> None:
        """`check_memory` raises where so many bytes more would be too many."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._tokens_per_second = tokens_per_second
        self._check_memory = check_memory
        self.requests = 0
        self.tokens = 0

    @contextmanager
    def admit(self, estimated_tokens: int, result_bytes: int = 0) -> Iterator[Permit]:
        """Hold room for a request as long as the context lasts. A lone request is admitted whatever its size.

        Raises:
            Overloaded: no room now. MemoryLow: the machine has too little memory left.
        """
        self._check_memory(result_bytes)
        if self.requests >= self._max_requests:
            raise self._overloaded(f"{self.requests} requests are in progress (MAX_CONCURRENT_REQUESTS)")
        if self.tokens and self.tokens + estimated_tokens > self._max_tokens:
            raise self._overloaded(f"{self.tokens} tokens are waiting (MAX_QUEUED_TOKENS)")
        permit = Permit(estimated_tokens, settle=lambda counted: self._settle(permit, counted))
        self.requests += 1
        self.tokens += permit.tokens
        try:
            yield permit
        finally:
            self.requests -= 1
            self.tokens -= permit.tokens

    def _settle(self, permit: Permit, counted: int) -> None:
        self.tokens += counted - permit.tokens
        permit.tokens = counted

    def _overloaded(self, reason: str) -> Overloaded:
        error = Overloaded(f"The server is temporarily overloaded: {reason}; try again after Retry-After seconds.")
        rate = self._tokens_per_second()
        error.retry_after = min(LONGEST_RETRY_AFTER, max(1, ceil(self.tokens / rate / 4))) if rate else 1
        return error
