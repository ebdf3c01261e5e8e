"""Where the rooms above report what happens: one call reaches the metrics and the rolling statistics of /stats."""

from __future__ import annotations

import asyncio
import collections
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, perf_counter

import numpy as np

from vecmill.core.errors import (
    BatchFailed,
    DeadlineExceeded,
    EngineFailed,
    MemoryLow,
    Overloaded,
    Unavailable,
    VecmillError,
)
from vecmill.core.types import Lane, Outcome, PassRecord, RequestRecord
from vecmill.telemetry.metrics import Metrics, Values
from vecmill.telemetry.rates import RATE_SECONDS, Rates, UserId, Work
from vecmill.telemetry.refusals import Blame, Refusals

# The nearest class in an error's MRO decides.
OUTCOMES: Mapping[type[BaseException], Outcome] = {
    Overloaded: Outcome.OVERLOADED,
    MemoryLow: Outcome.OVERLOADED,
    DeadlineExceeded: Outcome.TIMEOUT,
    BatchFailed: Outcome.ERROR,
    EngineFailed: Outcome.ERROR,
    Unavailable: Outcome.UNAVAILABLE,
    VecmillError: Outcome.REFUSED,
    asyncio.CancelledError: Outcome.CANCELLED,
    BaseException: Outcome.ERROR,
}


def outcome_of(error: BaseException) -> Outcome:
    """How a request ended that failed with an error."""
    return next(OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES)


class Recording:
    """Reports a request's record when the block that it stands for ends, whether it has a result or failed."""

    __slots__ = ("_record", "_telemetry")

    def __init__(self, telemetry: Telemetry, record: RequestRecord) -> None:
        self._telemetry = telemetry
        self._record = record

    def __enter__(self) -> RequestRecord:
        self._record.arrived = perf_counter()
        self._telemetry.in_flight.add(self._record)
        return self._record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        record = self._record
        record.total, record.at = perf_counter() - record.arrived, monotonic()
        if error is not None:
            record.outcome = outcome_of(error)
        self._telemetry.in_flight.discard(record)
        self._telemetry.ended(record)


class Telemetry:
    """Where the rooms above report. Belongs to the event loop's thread."""

    def __init__(self, replica: str = "", *, everywhere: bool = False) -> None:
        """`replica`: the server's name, a label of every metric if `everywhere`."""
        self.metrics = Metrics(replica, everywhere=everywhere)
        self.rolling = Rolling()
        self.rates = Rates()
        self.refusals = Refusals()
        self.knee_of: Callable[[str], int] = lambda model: 0
        """By the scheduler's key of a model, the tokens below which a forward pass takes about as long; 0: unknown."""
        self.in_flight: set[RequestRecord] = set()
        self._seen: set[tuple[str, str, str]] = set()
        self.metrics.in_flight.set_function(self._count_in_flight)

    def recording(self, record: RequestRecord) -> Recording:
        """A context in which the request is worked on; its end is reported."""
        return Recording(self, record)

    def _count_in_flight(self) -> Values:
        counts: dict[tuple[str, ...], float | None] = dict.fromkeys(self._seen, 0)
        counts |= collections.Counter((record.operation, record.model, record.lane or "") for record in self.in_flight)
        return counts

    def ended(self, record: RequestRecord) -> None:
        """An inference request has its result, or has failed."""
        self.metrics.request_ended(record)
        if record.lane is not None:
            self._seen.add((record.operation, record.model, record.lane))
        if record.outcome is Outcome.OK:
            self._count(record)

    def _count(self, record: RequestRecord) -> None:
        self.rolling.add_request(record)
        searches = int(record.lane is Lane.INTERACTIVE)
        work = Work(record.texts, record.tokens, 1, searches, record.cached, record.cached_tokens)
        self.rates.answered(work, UserId(record.owner, record.client, record.job), record.total)

    def batch(self, batch: PassRecord) -> None:
        """A forward pass is over."""
        self.metrics.pass_ended(batch)
        if not batch.failed:
            self.rolling.add_batch(batch.rows)
            self.rates.forward_pass(batch.tokens, batch.seconds, self.knee_of(batch.model))

    def error(self, status: int, kind: str, dialect: str, blame: Blame) -> None:
        """A request was answered with an error of this class."""
        self.metrics.errors.labels(dialect, str(status), kind).inc()
        self.rolling.errors += blame is Blame.SERVER
        self.rolling.refused += blame is Blame.LOAD
        self.rolling.client_errors += blame is Blame.CLIENT


SAMPLES = 1000


class Rolling:
    """Totals since the start and a window of recent samples. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.errors = 0
        """Answers with an error that is the server's own."""
        self.refused = 0
        """Requests that were refused for the load."""
        self.client_errors = 0
        """Requests that were refused for what they say."""
        self.queue_waits = 0
        self.warmup_seconds: tuple[float, ...] = ()
        self._samples: deque[RequestRecord] = deque(maxlen=SAMPLES)
        self._totals: dict[Lane | None, deque[tuple[float, float]]] = {lane: deque(maxlen=SAMPLES) for lane in Lane}
        """When the last requests of each lane were answered, and after how many milliseconds."""
        self._batch_rows: deque[int] = deque(maxlen=SAMPLES)

    def add_request(self, request: RequestRecord) -> None:
        """Take an answered request among the samples."""
        self.queue_waits += request.waited
        self._samples.append(request)
        self._totals[request.lane].append((request.at, 1000 * request.total))

    def add_batch(self, rows: int) -> None:
        """Count a forward pass."""
        self._batch_rows.append(rows)

    @property
    def uptime(self) -> float:
        """Seconds."""
        return monotonic() - self.started

    def recent_latency_ms(self, lane: Lane, seconds: float = RATE_SECONDS) -> Mapping[str, float | None]:
        """The same as `latency_ms` of the `total` times of the last `seconds`, of at most SAMPLES requests."""
        since = monotonic() - seconds
        return summary(taken for at, taken in self._totals[lane] if at >= since)

    def latency_ms(self, stage: str, lane: Lane | None = None) -> Mapping[str, float | None]:
        """min, p50, p95, max and mean of `total`, `tokenize`, `queue`, `forward` or `overhead` over recent requests."""
        samples = (sample for sample in self._samples if lane is None or sample.lane is lane)
        return summary([1000 * float(getattr(sample, stage)) for sample in samples])

    def per_text_ms(self) -> Mapping[str, float | None]:
        """The same for device time per text."""
        return summary([1000 * sample.forward / sample.texts for sample in self._samples if sample.texts])

    @property
    def sample_count(self) -> int:
        return len(self._samples)

    def batch_distribution(self) -> Mapping[str, int]:
        """How many recent batches had how many rows."""
        return {str(rows): count for rows, count in sorted(collections.Counter(self._batch_rows).items())}

    def recent_batch_rows(self) -> float | None:
        """Mean rows per recent batch."""
        return float(np.mean(self._batch_rows)) if self._batch_rows else None


def summary(values: Iterable[float]) -> Mapping[str, float | None]:
    """min, p50, p95, max, mean; None where there is nothing to summarise."""
    array = np.fromiter(values, dtype=np.float64)
    if not array.size:
        return dict.fromkeys(("min", "p50", "p95", "max", "mean"))
    p50, p95 = np.percentile(array, [50, 95])
    values_by_name = {"min": array.min(), "p50": p50, "p95": p95, "max": array.max(), "mean": array.mean()}
    return {name: round(float(value), 3) for name, value in values_by_name.items()}
