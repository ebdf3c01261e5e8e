"""One call for each thing that happens; it reaches the metrics and the rolling statistics of /stats alike."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from vecmill.core.types import Lane
from vecmill.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered inference request; times in seconds."""

    operation: str
    """`embed` or `rerank`."""
    model: str
    lane: Lane
    texts: int
    tokens: int
    truncated: int
    """Texts that were cut."""
    cached: int
    """Texts that were not run, and their tokens."""
    cached_tokens: int
    total: float
    tokenize: float
    queue: float
    infer: float
    waited: bool
    """Whether other work was ahead of it."""
    at: float = field(default_factory=monotonic)

    @property
    def overhead(self) -> float:
        """What is neither queue nor device: parsing, tokenizing, encoding."""
        return max(0.0, self.total - self.queue - self.infer)


class Telemetry:
    """Where the rooms above report. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.rolling = Rolling()

    def answered(self, request: Answered) -> None:
        """An inference request has its result."""
        operation, model = request.operation, request.model
        self.metrics.requests.labels(operation, model).inc()
        self.metrics.texts.labels(operation, model).inc(request.texts)
        self.metrics.tokens.labels(operation, model).inc(request.tokens)
        self.metrics.truncated.labels(model).inc(request.truncated)
        self.metrics.cached_texts.labels(operation, model).inc(request.cached)
        self.metrics.cached_tokens.labels(operation, model).inc(request.cached_tokens)
        for stage in ("total", "tokenize", "queue", "infer"):
            seconds = getattr(request, stage)
            self.metrics.request_seconds.labels(operation, request.lane.value, stage).observe(seconds)
        self.rolling.add_request(request)

    def batch(self, lane: Lane, rows: int, tokens: int, seconds: float, splits: int) -> None:
        """A batch ended; it was halved `splits` times for lack of memory."""
        self.metrics.batch_rows.labels(lane.value).observe(rows)
        self.metrics.batch_tokens.labels(lane.value).observe(tokens)
        self.metrics.batch_seconds.labels(lane.value).observe(seconds)
        self.metrics.splits.inc(splits)
        self.rolling.add_batch(rows)

    def error(self, status: int, kind: str) -> None:
        """A request was answered with an error."""
        self.metrics.errors.labels(str(status), kind).inc()
        self.rolling.errors += 1


SAMPLES = 1000
WINDOW_SECONDS = 60.0


class Rolling:
    """Totals since the start and a window of recent samples. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.requests = 0
        self.texts = 0
        self.tokens = 0
        self.cached_texts = 0
        self.cached_tokens = 0
        self.errors = 0
        self.queue_waits = 0
        self.warmup_seconds: tuple[float, ...] = ()
        self._samples: deque[Answered] = deque(maxlen=SAMPLES)
        self._batch_rows: deque[int] = deque(maxlen=SAMPLES)

    def add_request(self, request: Answered) -> None:
        """Count an answered request."""
        self.requests += 1
        self.texts += request.texts
        self.tokens += request.tokens
        self.cached_texts += request.cached
        self.cached_tokens += request.cached_tokens
        self.queue_waits += request.waited
        self._samples.append(request)

    def add_batch(self, rows: int) -> None:
        """Count a forward pass."""
        self._batch_rows.append(rows)

    @property
    def uptime(self) -> float:
        """Seconds."""
        return monotonic() - self.started

    def rates(self) -> tuple[float, float]:
        """Texts and tokens per second over the last minute, or since the start if that is less."""
        now = monotonic()
        recent = [sample for sample in self._samples if now - sample.at <= WINDOW_SECONDS]
        # A full window of samples may cover less than a minute: then it is the span that they cover that counts.
        since = recent[0].at if len(recent) == SAMPLES else now - WINDOW_SECONDS
        span = max(now - max(self.started, since), 1e-3)
        return sum(sample.texts for sample in recent) / span, sum(sample.tokens for sample in recent) / span

    def latency_ms(self, stage: str, lane: Lane | None = None) -> Mapping[str, float | None]:
        """min, p50, p95, max and mean of `total`, `tokenize`, `queue`, `infer` or `overhead` over recent requests."""
        samples = (sample for sample in self._samples if lane is None or sample.lane is lane)
        return summary([1000 * float(getattr(sample, stage)) for sample in samples])

    def per_text_ms(self) -> Mapping[str, float | None]:
        """The same for device time per text."""
        return summary([1000 * sample.infer / sample.texts for sample in self._samples if sample.texts])

    @property
    def sample_count(self) -> int:
        return len(self._samples)

    def batch_distribution(self) -> Mapping[str, int]:
        """How many recent batches had how many rows."""
        return {str(rows): count for rows, count in sorted(Counter(self._batch_rows).items())}

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
