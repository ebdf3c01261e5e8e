"""What a forward pass costs on this device, and how many tokens it should therefore hold.

A pass takes about `a + b * tokens` seconds. With few tokens `a` decides (weights to be read, kernels to be launched)
and more tokens ride along for next to nothing; with many, `b` decides and more tokens only make others wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import monotonic, time
from typing import Self

import numpy as np

# Smallest budget that the rate alone would choose: about one code chunk.
FEWEST_TOKENS = 128
# The share of the best tokens per second that a bulk forward is to reach. On a CPU it may take longer: a search waits
# for one of its layers, not for all.
BULK_RATE_FRACTION, BULK_RATE_FRACTION_ON_CPU = 0.95, 0.98
FREE_RIDE_TIME_FRACTION = 1 / 8  # of MAX_BATCH_MS, which bulk may add to an interactive forward
# Packs are rounded up to a multiple of 64, smaller ones to 16 or 32: a budget in between gains nothing.
STEP, SMALLEST_PACK, LONGEST_PACK = 64, 16, 1 << 20
# Passes of one size (tokens to the next power of two) that are remembered, for how long, and how many are enough.
REMEMBERED, REMEMBERED_SECONDS, ENOUGH = 32, 600.0, 8
# What disturbs a pass makes it longer, never shorter: of the remembered ones this quantile counts.
UNDISTURBED = 0.25
# Seconds between two changes of a fit; the largest change of what it expects at any size, as a factor; and the
# smallest that it is changed for, as a share.
REFIT_SECONDS, LARGEST_CHANGE, LEAST_CHANGE = 5.0, 1.5, 0.1
FARTHEST = 30.0  # as a factor: how far a fit may get from what warm-up measured


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

    def bulk_tokens(self, max_seconds: float, largest: int, rate: float = BULK_RATE_FRACTION) -> int:
        """Tokens of a bulk forward: the fewest that reach the share `rate` of the best rate.

        It takes `max_seconds` at most, and has `largest` tokens at most.
        If even an empty forward takes longer than `max_seconds`, half the knee: the pass takes 1.5 times as long as an
        empty one, and no shorter pass would meet the limit either.
        """
        # t / (a + b t) = rate / b
        enough = max(FEWEST_TOKENS, self.knee_tokens * rate / (1 - rate))
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
    largest_tokens: int
    """Of the largest forward pass that was tried: no budget is larger."""
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
    changed_at: float = field(default_factory=time)
    """Unix time at which the fit, and with it the budgets, became what they are."""
    is_provisional: bool = False
    """Whether it is a first look, or of an earlier start: to be measured once nobody waits."""
    bulk_rate: float = BULK_RATE_FRACTION
    """The share of the best rate that a bulk forward is to reach."""
    next_dtype: str | None = None
    """The type that the weights get at the next start, where another has turned out to be faster."""

    def refitted(self, calibration: Calibration, max_seconds: float) -> Self:
        """The same with another fit, and the budgets that follow from it where a pass may take `max_seconds`."""
        max_batch_tokens = calibration.bulk_tokens(max_seconds, self.largest_tokens, self.bulk_rate)
        free_tokens = min(calibration.free_tokens(max_seconds), max_batch_tokens)
        return replace(
            self,
            calibration=calibration,
            max_batch_tokens=max_batch_tokens,
            free_tokens=free_tokens,
            changed_at=time(),
        )


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


class RunningFit:
    """A calibration that follows what forward passes take while a model is served.

    Warm-up may have run beside other work, and clocks change. A size of which no passes are seen is taken to have
    become faster or slower by the same factor as the others.
    """

    def __init__(self, calibration: Calibration, clock: Callable[[], float] = monotonic) -> None:
        self.calibration = self._first = calibration
        self._clock = clock
        self._looked_at = clock()
        self._recent: dict[int, deque[tuple[float, int, float]]] = {}
        """By size: when a pass ended, its tokens, its seconds."""

    def add(self, tokens: int, seconds: float) -> bool:
        """Take note of a forward pass; True where `calibration` has changed by it."""
        if tokens < 1 or not 0 < seconds < float("inf"):
            return False
        now = self._clock()
        size = max(tokens, SMALLEST_PACK).bit_length()
        self._recent.setdefault(size, deque(maxlen=REMEMBERED)).append((now, tokens, seconds))
        if now - self._looked_at < REFIT_SECONDS:
            return False
        self._looked_at = now
        return self._refit(now)

    def _refit(self, now: float) -> bool:
        ratios = self._ratios(now)
        if not ratios:
            return False
        line, common = self.calibration, median(ratios.values())
        shapes = {tokens.bit_length(): tokens for tokens, _ in line.measured}
        shapes |= {size: 3 << (size - 2) for size in ratios}
        seen = fit([(tokens, line.seconds(tokens) * ratios.get(size, common)) for size, tokens in shapes.items()])
        changes = [seen.seconds(tokens) / line.seconds(tokens) - 1 for tokens in shapes.values()]
        if max(map(abs, changes)) < LEAST_CHANGE:
            return False
        # A part of the way, so that no size changes by more than LARGEST_CHANGE.
        ends = (seen.seconds(tokens) / line.seconds(tokens) - 1 for tokens in (SMALLEST_PACK, LONGEST_PACK))
        share = min(1.0, *(_most(change) / abs(change) for change in (*changes, *ends) if change))
        moved = Calibration(
            seen.measured,
            line.fixed_seconds + share * (seen.fixed_seconds - line.fixed_seconds),
            line.seconds_per_token + share * (seen.seconds_per_token - line.seconds_per_token),
        )
        away = [moved.seconds(tokens) / self._first.seconds(tokens) for tokens in (SMALLEST_PACK, LONGEST_PACK)]
        if not all(1 / FARTHEST <= times <= FARTHEST for times in away):
            return False
        self.calibration = moved
        return True

    def _ratios(self, now: float) -> dict[int, float]:
        """How many times as long as expected undisturbed passes take, by size."""
        ratios = {}
        for size, passes in self._recent.items():
            while passes and now - passes[0][0] > REMEMBERED_SECONDS:
                passes.popleft()
            if len(passes) >= ENOUGH:
                taken = [seconds / self.calibration.seconds(tokens) for _, tokens, seconds in passes]
                ratios[size] = float(np.quantile(taken, UNDISTURBED))
        return ratios


def _most(change: float) -> float:
    """The largest share of its expected time that a pass may gain, or lose, in one change."""
    return LARGEST_CHANGE - 1 if change > 0 else 1 - 1 / LARGEST_CHANGE
