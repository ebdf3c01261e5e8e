"""What the server did over the last 24 hours: a value of each series for every step of ten seconds.

The memory is as large at the start as it ever gets (8,640 steps, 4 bytes a value). A step in which the server did not
run, or of which something is not known, is NaN here and null in JSON.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

STEP_SECONDS = 10
STEPS = 24 * 3600 // STEP_SECONDS
MOST_POINTS = 720
MOST_SERIES = 256  # of a file


class Kind(StrEnum):
    """How the values of several steps become one."""

    MEAN = "mean"
    SUM = "sum"
    HIGHEST = "highest"


SERIES: Mapping[str, Kind] = {
    "texts_per_second": Kind.MEAN,
    "tokens_per_second": Kind.MEAN,
    "requests_per_second": Kind.MEAN,
    "searches_per_second": Kind.MEAN,
    "interactive_p50_ms": Kind.MEAN,
    "interactive_p95_ms": Kind.HIGHEST,
    "bulk_p50_ms": Kind.MEAN,
    "bulk_p95_ms": Kind.HIGHEST,
    "interactive_queue_texts": Kind.HIGHEST,
    "interactive_queue_tokens": Kind.HIGHEST,
    "bulk_queue_texts": Kind.HIGHEST,
    "bulk_queue_tokens": Kind.HIGHEST,
    "cache_hit_ratio": Kind.MEAN,
    "tokens_saved_per_second": Kind.MEAN,
    "tokens_per_pass": Kind.MEAN,
    "batch_fill_ratio": Kind.MEAN,
    "device_busy_ratio": Kind.MEAN,
    "errors": Kind.SUM,
    "refused": Kind.SUM,
    "memory_ours_bytes": Kind.MEAN,
    "memory_page_cache_bytes": Kind.MEAN,
    "memory_free_bytes": Kind.MEAN,
    "gpu_utilization_ratio": Kind.MEAN,
    "gpu_power_watts": Kind.MEAN,
    "gpu_sm_clock_mhz": Kind.MEAN,
    "gpu_temperature_c": Kind.MEAN,
}
"""Every series, and what becomes of it where steps are put together."""
OF_WORK = ("cache_hit_ratio", "tokens_saved_per_second", "tokens_per_pass", "batch_fill_ratio", "device_busy_ratio")
"""Those that tell how much had to be computed, and so what was in the cache."""

MAGIC = b"vecmill-history 1\n"
StepValues = NDArray[np.float32]  # (n_series, n_steps)


class UnreadableHistory(ValueError):
    """The bytes are no history, or one of another version; the message says which."""


@dataclass(frozen=True, slots=True)
class Span:
    """Some of the history."""

    step_seconds: int
    at: list[int]
    """Unix time of each point's beginning."""
    series: Mapping[str, list[float | None]]

    def as_json(self, hidden: Sequence[str] = ()) -> dict[str, Any]:
        """The span as an answer, without the values of the `hidden` series."""
        nothing = [None] * len(self.at)
        series = {name: nothing if name in hidden else values for name, values in self.series.items()}
        return {"step_seconds": self.step_seconds, "at": self.at, "series": series}


class History:
    """A ring of the last STEPS steps. For one thread at a time."""

    def __init__(self) -> None:
        self._values: StepValues = np.full((len(SERIES), STEPS), np.nan, np.float32)
        self._latest: int | None = None
        """The number of the newest step, since 1970."""
        self._seen_seconds = 0.0
        """How much of the newest step its values were measured in."""

    def add(self, at: float, values: Mapping[str, float | None], seconds: float = STEP_SECONDS) -> None:
        """Record what was measured in `seconds` of the step in which the Unix time `at` is.

        A step may have several parts, as when the server is started again within it: the newest step's are put
        together, means by their seconds. Older steps are left as they were.
        """
        step, seconds = int(at // STEP_SECONDS), min(max(seconds, 1e-3), STEP_SECONDS)
        if self._latest is not None and step <= self._latest - STEPS:
            self._latest = None  # the machine's clock was wrong by more than a day
        if self._latest is None or step > self._latest:
            self._forget_until(step)
        measured = np.array([_number(values.get(name)) for name in SERIES], np.float32)
        if step == self._latest and self._seen_seconds:
            parts = np.stack([self._values[:, step % STEPS], measured], axis=1)
            weights = np.array([self._seen_seconds, seconds])
            measured = np.array([_joined(parts[[row]], kind, weights)[0] for row, kind in enumerate(SERIES.values())])
        self._values[:, step % STEPS] = measured
        if step == self._latest:
            self._seen_seconds = min(self._seen_seconds + seconds, STEP_SECONDS)

    def _forget_until(self, step: int) -> None:
        """Steps that were left out are unknown: the server did not run, or could not look."""
        first = step - STEPS + 1 if self._latest is None else max(self._latest + 1, step - STEPS + 1)
        self._values[:, np.arange(first, step + 1) % STEPS] = np.nan
        self._latest, self._seen_seconds = step, 0.0

    def span(self, seconds: float, now: float) -> Span:
        """The steps of the last `seconds` that have ended, put together to MOST_POINTS points at the most."""
        count = min(STEPS, int(seconds // STEP_SECONDS))
        together = -(-count // MOST_POINTS)
        end = int(now // STEP_SECONDS) // together * together
        points = count // together
        steps = np.arange(end - points * together, end)
        known = np.zeros(len(steps), bool) if self._latest is None else self._is_kept(steps, self._latest)
        values = np.where(known, self._values[:, steps % STEPS], np.nan).reshape(len(SERIES), points, together)
        series = {name: _listed(_joined(values[row], kind)) for row, (name, kind) in enumerate(SERIES.items())}
        at = (steps[::together] * STEP_SECONDS).tolist()
        return Span(together * STEP_SECONDS, at, series)

    def copy(self) -> History:
        """The same, to be read by another thread."""
        copy = History()
        copy._values, copy._latest, copy._seen_seconds = self._values.copy(), self._latest, self._seen_seconds
        return copy

    @staticmethod
    def _is_kept(steps: NDArray[np.int64], latest: int) -> NDArray[np.bool_]:
        return (steps > latest - STEPS) & (steps <= latest)

    def to_bytes(self) -> bytes:
        """All of it, to be kept in a file."""
        body = zlib.compress(self._values.tobytes(), 1)
        head = {
            "latest": self._latest,
            "latest_seconds": self._seen_seconds,
            "series": list(SERIES),
            "steps": STEPS,
            "step_seconds": STEP_SECONDS,
            "bytes": len(body),
            "crc": zlib.crc32(body),
        }
        return MAGIC + json.dumps(head).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` gave, also of a server that had fewer or more series.

        Raises:
            UnreadableHistory: it is something else, is of another version, or has been damaged.
        """
        if not data.startswith(MAGIC):
            raise UnreadableHistory("it is no history of this version")
        head, _, body = data.removeprefix(MAGIC).partition(b"\n")
        try:
            facts = json.loads(head)
            names, latest = facts["series"], facts["latest"]
            seen_seconds = min(max(float(facts.get("latest_seconds", 0.0)), 0.0), STEP_SECONDS)
            fits = (facts["steps"], facts["step_seconds"]) == (STEPS, STEP_SECONDS)
            whole = len(body) == facts["bytes"] and zlib.crc32(body) == facts["crc"]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise UnreadableHistory("its head cannot be read") from None
        if not (fits and isinstance(names, list) and isinstance(latest, int | None) and len(names) <= MOST_SERIES):
            raise UnreadableHistory("it has other steps")
        size = 4 * len(names) * STEPS
        if not whole or (unpacked := _unpacked(body, size)) is None:
            raise UnreadableHistory("it is damaged")
        history = cls()
        kept = np.frombuffer(unpacked, np.float32).reshape(len(names), STEPS)
        for row, name in enumerate(SERIES):
            if name in names:
                history._values[row] = kept[names.index(name)]
        history._latest, history._seen_seconds = latest, seen_seconds
        return history


def _unpacked(body: bytes, size: int) -> bytes | None:
    """The body, if it is of this size: one that grows beyond it when unpacked is no history."""
    unpacking = zlib.decompressobj()
    try:
        unpacked = unpacking.decompress(body, size + 1)
    except zlib.error:
        return None
    return unpacked if len(unpacked) == size else None


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _joined(values: StepValues, kind: Kind, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """One value for each row, of those of its values that are known; a mean by the columns' weights."""
    known = ~np.isnan(values)
    if kind is Kind.HIGHEST:
        joined = np.where(known, values, -np.inf).max(axis=1).astype(np.float64)
    elif kind is Kind.SUM:
        joined = np.where(known, values, 0.0).sum(axis=1, dtype=np.float64)
    else:
        shares = known * (np.ones(values.shape[1]) if weights is None else weights)
        joined = (np.where(known, values, 0.0) * shares).sum(axis=1) / np.maximum(shares.sum(axis=1), 1e-9)
    return np.where(known.any(axis=1), joined, np.nan)


def _listed(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values]
