"""How fast chunks are done, by what was done last."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp


@dataclass(frozen=True, slots=True)
class Pace:
    """A mean over time, weighted exponentially: what lies one time constant back counts 1/e of what is now."""

    chunks: float = 0.0
    seconds: float = 0.0

    def plus(self, chunks: float, seconds: float, constant: float) -> Pace:
        """With the chunks of the `seconds` since the last report."""
        if seconds <= 0:
            return Pace(self.chunks + chunks, self.seconds)
        faded = exp(-seconds / constant)
        # The integral of the weights over the new seconds, during which the chunks are taken to have come evenly.
        new = constant * (1 - faded)
        return Pace(self.chunks * faded + chunks / seconds * new, self.seconds * faded + new)

    @property
    def rate(self) -> float | None:
        """Chunks per second; None before the first were done."""
        return self.chunks / self.seconds if self.chunks > 0 and self.seconds > 0 else None
