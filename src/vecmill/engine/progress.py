"""Whether the device gets on with what it has been given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

# A forward pass is taken for hung after this many times what warm-up says that it takes, and no earlier than after a
# minute: an unforeseen shape may be compiled first.
TIMES_EXPECTED = 20
FEWEST_SECONDS = 60.0


class Progress:
    """Forward passes that are not answered yet. Belongs to the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._expected: list[float] = []
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._expected)

    @contextmanager
    def of(self, expected_seconds: float) -> Iterator[None]:
        """One forward pass, from when it is handed over until it is answered."""
        if not self._expected:
            self._since = self._clock()
        self._expected.append(expected_seconds)
        try:
            yield
        finally:
            self._expected.remove(expected_seconds)
            self._since = self._clock()

    def hung(self) -> str | None:
        """What has taken far too long; None while there is progress, or nothing to do."""
        if not self._expected:
            return None
        longest, seconds = max(self._expected), self._clock() - self._since
        if seconds <= max(FEWEST_SECONDS, TIMES_EXPECTED * longest):
            return None
        return f"the device has answered nothing for {seconds:.0f} s; the longest forward pass takes {longest:.3g} s"
