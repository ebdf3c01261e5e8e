"""What a forward pass costs on this device, and how many tokens it should therefore hold.

A pass takes about `a + b * tokens` seconds. With few tokens `a` decides (weights to be read, kernels to be launched)
and more tokens ride along for next to nothing; with many, `b` decides and more tokens only make others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Smallest budget that the rate alone would choose: about one code chunk.
FEWEST_TOKENS = 128
BULK_RATE_FRACTION = 0.95  # of the best tokens per second, which a bulk forward reaches
FREE_RIDE_TIME_FRACTION = 1 / 8  # of MAX_BATCH_MS, which bulk may add to an interactive forward
# Packs are rounded up to a multiple of 64, the smallest to 16: a budget in between gains nothing.
STEP, SMALLEST_PACK = 64, 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured forward passes of one model and the line through them."""

    measured: tuple[tuple[int, float], ...]
    """(tokens, seconds) of each shape."""
    fixed_seconds: float
    """`a`"""
    seconds_per_token: float
    """`b`"""

    @property
    def best_rate(self) -> float:
        """Tokens per second of an endless forward."""
        return 1 / self.seconds_per_token

    @property
    def knee_tokens(self) -> int:
        """Tokens at which `b * tokens` equals `a`: with fewer, the fixed cost is the larger part of a pass."""
        return max(1, round(self.fixed_seconds / self.seconds_per_token))

    def seconds(self, tokens: int) -> float:
        """Expected time of a forward pass."""
        return self.fixed_seconds + self.seconds_per_token * tokens

    def bulk_tokens(self, max_seconds: float, largest: int) -> int:
        """Tokens of a bulk forward: the fewest with 95 % of the best rate, in `max_seconds` and up to `largest`.

        If even an empty forward takes longer than `max_seconds`, half the knee: the pass takes 1.5 times as long as an
        empty one, and no shorter pass would meet the limit either.
        """
        # t / (a + b t) = 0.95 / b
        enough = max(FEWEST_TOKENS, self.knee_tokens * BULK_RATE_FRACTION / (1 - BULK_RATE_FRACTION))
        in_time = (max_seconds - self.fixed_seconds) / self.seconds_per_token
        if in_time <= 0:
            in_time = self.knee_tokens / 2
        tokens = int(min(enough, max(in_time, SMALLEST_PACK)))
        return min(tokens // STEP * STEP if tokens > STEP else tokens, largest)

    def free_tokens(self, max_seconds: float) -> int:
        """Tokens up to which bulk fills an interactive forward: the knee, or what takes an eighth of `max_seconds`.

        The fixed cost `a` is then paid once for both, and the query waits only a little longer.
        """
        in_time = (max_seconds * FREE_RIDE_TIME_FRACTION - self.fixed_seconds) / self.seconds_per_token
        return max(self.knee_tokens, int(in_time))


@dataclass(frozen=True, slots=True)
class Warmed:
    """What warm-up found out about a model."""

    calibration: Calibration
    max_batch_tokens: int
    """Tokens of a bulk forward."""
    max_batch_size: int
    """Rows of a forward."""
    free_tokens: int
    """Tokens up to which bulk fills an interactive forward."""
    compiled: bool
    compile_reason: str
    graphs: int
    """CUDA graphs that were captured."""
    graph_tokens: int
    """Of the largest of them."""
    graph_memory_bytes: int
    seconds: tuple[float, ...]
    """Of each forward pass that was run."""


def fit(measured: Sequence[tuple[int, float]]) -> Calibration:
    """The line through (tokens, seconds) with the least squared relative errors; needs one point."""
    tokens, seconds = np.array(measured, dtype=np.float64).T
    if len(measured) == 1:
        return Calibration(tuple(measured), 0.0, float(seconds[0] / tokens[0]))
    design = np.stack((1 / seconds, tokens / seconds), axis=1)
    (fixed, per_token), *_ = np.linalg.lstsq(design, np.ones(len(tokens)), rcond=None)
    if fixed < 0 or per_token <= 0:  # other programs disturbed the measurement: rely on the largest shape
        largest = int(tokens.argmax())
        fixed, per_token = 0.0, seconds[largest] / tokens[largest]
    return Calibration(tuple(measured), float(fixed), float(per_token))
