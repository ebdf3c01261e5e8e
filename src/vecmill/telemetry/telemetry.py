"""One call for each thing that happens; it reaches the metrics and the rolling statistics of /stats alike."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import monotonic

import numpy as np

from vecmill.core.types import Lane, Timings
from vecmill.telemetry.metrics import Metrics


class Telemetry:
    """Where the rooms above report. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.rolling = Rolling()

    def answered(
        self,
        operation: str,
        model: str,
        lane: Lane,
        *,
        texts: int,
        tokens: int,
        truncated: int,
        cached: int,
        cached_tokens: int,
        total: float,
        timings: Timings,
        waited: bool,
    ) -> None:
        """An inference request has its result. `operation` is embed or rerank; times in seconds.

        `cached` of the texts, with `cached_tokens`, were not run.
        """
        self.metrics.requests.labels(operation, model).inc()
        self.metrics.texts.labels(operation, model).inc(texts)
        self.metrics.tokens.labels(operation, model).inc(tokens)
        self.metrics.truncated.labels(model).inc(truncated)
        self.metrics.cached_texts.labels(operation, model).inc(cached)
        self.metrics.cached_tokens.labels(operation, model).inc(cached_tokens)
        stages = {
            "total": total,
            "tokenize": timings.tokenize,
            "queue": timings.queue,
            "infer": timings.infer,
        }
        for stage, seconds in stages.items():
            self.metrics.request_seconds.labels(operation, lane.value, stage).observe(seconds)
        sample = RequestSample(monotonic(), lane, texts, tokens, total, timings.tokenize, timings.queue, timings.infer)
        self.rolling.add_request(sample, waited=waited, cached=cached, cached_tokens=cached_tokens)

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


@dataclass(frozen=True, slots=True)
class RequestSample:
    """One answered inference request; times in seconds."""

    at: float
    lane: Lane
    texts: int
    tokens: int
    total: float
    tokenize: float
    queue: float
    infer: float

    @property
    def overhead(self) -> float:
        """What is neither queue nor device: parsing, tokenizing, encoding."""
        return max(0.0, self.total - self.queue - self.infer)


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
        self._samples: deque[RequestSample] = deque(maxlen=SAMPLES)
        self._batch_rows: deque[int] = deque(maxlen=SAMPLES)

    def add_request(self, sample: RequestSample, *, waited: bool, cached: int = 0, cached_tokens: int = 0) -> None:
        """Count an answered request. `waited`: other work was ahead of it; `cached`: texts that were not run."""
        self.requests += 1
        self.texts += sample.texts
        self.tokens += sample.tokens
        self.cached_texts += cached
        self.cached_tokens += cached_tokens
        self.queue_waits += waited
        self._samples.append(sample)

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
    found = {"min": array.min(), "p50": p50, "p95": p95, "max": array.max(), "mean": array.mean()}
    return {name: round(float(value), 3) for name, value in found.items()}
