"""Unix time that neither goes back nor jumps when somebody sets the machine's clock; durations as people write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf, isnan
from time import monotonic, time

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)"
DURATION = re.compile(rf"([+-]?)((?:{PART})+)", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
LONGEST_WRITTEN = 64  # characters


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


def parse_duration(value: object) -> float:
    """Seconds of a duration as Ollama takes it: a number of seconds, or a text such as `5m`, `1h30m` or `300`.

    Whatever is negative means for ever, `inf`.

    Source: https://pkg.go.dev/time#ParseDuration, and Ollama's `api.Duration`, which takes no text without a unit.

    Raises:
        ValueError: it is neither.
    """
    seconds = _seconds(value)
    if seconds is None or isnan(seconds):
        raise ValueError("must be seconds as a number, or a duration such as `5m`, `1h30m` or `0`; -1 is for ever")
    return inf if seconds < 0 else seconds


def _seconds(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return inf if value > 1e18 else float(value)
    if not isinstance(value, str) or len(value) > LONGEST_WRITTEN:
        return None
    text = value.strip()
    if NUMBER.fullmatch(text):
        return float(text)
    match = DURATION.fullmatch(text)
    if match is None:
        return None
    seconds = sum(float(number) * UNITS[unit] for number, unit in re.findall(PART, match[2]))
    return -seconds if match[1] == "-" else seconds
