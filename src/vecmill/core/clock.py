"""Time for whatever lasts: Unix time that neither goes back nor jumps when somebody sets the machine's clock."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, time


class Clock:
    """Unix time as it was at the start, and the monotonic seconds since."""

    def __init__(self, wall: Callable[[], float] = time, monotonic: Callable[[], float] = monotonic) -> None:
        self._monotonic = monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        return self._monotonic() + self._offset

    def reach(self, latest: float) -> None:
        """Be no earlier than this: what was written before the clock was set back is still the past."""
        self._offset += max(0.0, latest - self())
