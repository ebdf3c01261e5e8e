"""One call for each thing that happens; it reaches the metrics and the rolling statistics alike."""

from __future__ import annotations

from time import monotonic

from vecmill.core.types import Lane, Timings
from vecmill.telemetry.metrics import Metrics
from vecmill.telemetry.rolling import RequestSample, Rolling


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
