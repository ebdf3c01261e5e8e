"""Every Prometheus metric, and the rolling statistics of /stats; one call for each thing that happens reaches both."""

from __future__ import annotations

import asyncio
import collections
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import monotonic, perf_counter

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from vecmill.core.errors import (
    BatchFailed,
    DeadlineExceeded,
    EngineFailed,
    MemoryLow,
    Overloaded,
    Unavailable,
    VecmillError,
)
from vecmill.core.types import Lane, Outcome, RequestRecord
from vecmill.telemetry.rates import RATE_SECONDS, Rates, UserId, Work
from vecmill.telemetry.refusals import Blame, Refusals

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


# Lines of the exposition that tell how much had to be computed, and so what was in the cache.
OF_WORK = re.compile(
    rb"(# \w+ )?vecmill_(cache|computed|joined|batch_(rows|tokens|duration))"
    rb"|vecmill_request_duration_seconds\w*{[^}]*stage=\"(tokenize|queue|forward)\""
)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vecmill_requests",
            "Inference requests answered with a result",
            ["operation", "model"],
            registry=registry,
        )
        self.errors = Counter(
            "vecmill_errors", "Requests answered with an error", ["status", "error"], registry=registry
        )
        self.texts = Counter("vecmill_texts", "Texts answered", ["operation", "model"], registry=registry)
        self.tokens = Counter("vecmill_tokens", "Tokens answered", ["operation", "model"], registry=registry)
        self.cached_texts = Counter(
            "vecmill_cached_texts",
            "Texts answered with a vector that was kept",
            ["operation", "model"],
            registry=registry,
        )
        self.cached_tokens = Counter(
            "vecmill_cached_tokens", "Tokens of those texts", ["operation", "model"], registry=registry
        )
        self.computed = Gauge("vecmill_computed_texts", "Texts run on the device", registry=registry)
        self.cache_entries = Gauge("vecmill_cache_entries", "Vectors in the cache", registry=registry)
        self.cache_bytes = Gauge("vecmill_cache_bytes", "What they take", registry=registry)
        self.cache_dropped = Gauge(
            "vecmill_cache_dropped", "Vectors dropped for lack of room, least recently used first", registry=registry
        )
        self.cache_lost = Gauge("vecmill_cache_lost", "Vectors that could not be kept", registry=registry)
        self.cache_failing = Gauge("vecmill_cache_failing", "1 while the cache cannot be used", registry=registry)
        self.truncated = Counter(
            "vecmill_truncated_texts", "Texts cut to the model's length", ["model"], registry=registry
        )
        self.request_seconds = Histogram(
            "vecmill_request_duration_seconds",
            "Time in the server by stage: total, tokenize, queue, forward",
            ["operation", "lane", "stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "vecmill_batch_rows", "Rows per forward pass", ["lane"], buckets=ROWS, registry=registry
        )
        self.batch_tokens = Histogram(
            "vecmill_batch_tokens", "Tokens per forward pass", ["lane"], buckets=TOKENS, registry=registry
        )
        self.batch_seconds = Histogram(
            "vecmill_batch_duration_seconds",
            "Time on the device per forward pass",
            ["lane"],
            buckets=SECONDS,
            registry=registry,
        )
        self.splits = Counter(
            "vecmill_out_of_memory_splits",
            "Batches halved because they did not fit into the device's memory",
            registry=registry,
        )
        self.waiting = Gauge("vecmill_waiting_texts", "Texts waiting for a batch", ["lane"], registry=registry)
        self.joined = Gauge(
            "vecmill_joined_texts", "Texts that waited for an equal one in place of being run", registry=registry
        )
        self.abandoned = Gauge(
            "vecmill_abandoned_texts", "Texts whose client left before they were run", registry=registry
        )
        self.expired = Gauge(
            "vecmill_expired_texts", "Texts whose deadline passed before they were run", registry=registry
        )
        self.max_batch_tokens = Gauge(
            "vecmill_max_batch_tokens", "Tokens of a bulk forward pass, at most", ["task", "model"], registry=registry
        )
        self.jobs = Gauge("vecmill_jobs", "Jobs by state", ["state"], registry=registry)
        self.batches = Gauge("vecmill_batches", "Batches in STATE_DIR by state", ["state"], registry=registry)
        self.batch_lines = Counter(
            "vecmill_batch_lines", "Lines of batches that are answered and on disk", ["outcome"], registry=registry
        )
        self.process_memory = Gauge("vecmill_process_memory_bytes", "Resident memory of the process", registry=registry)
        self.memory = OptionalGauge(
            "vecmill_memory_bytes", "Memory of the machine: total, available, swap_used", "kind", registry=registry
        )
        self.memory_pressure = OptionalGauge(
            "vecmill_memory_pressure_ratio",
            "Share of the last ten seconds in which some process waited for memory",
            registry=registry,
        )
        self.gpu_memory = OptionalGauge(
            "vecmill_gpu_memory_bytes",
            "Memory of the GPU, the machine's own where it is unified: total, available, allocated, reserved, "
            "this_process, other_processes",
            "kind",
            registry=registry,
        )
        self.gpu_utilization = OptionalGauge(
            "vecmill_gpu_utilization_ratio", "Share of the time in which a kernel ran", registry=registry
        )
        self.gpu_temperature = OptionalGauge(
            "vecmill_gpu_temperature_celsius", "Temperature of the GPU", registry=registry
        )
        self.gpu_power = OptionalGauge("vecmill_gpu_power_watts", "Power that the GPU draws", registry=registry)
        self.gpu_clock = OptionalGauge("vecmill_gpu_sm_clock_hertz", "Clock of the GPU's cores", registry=registry)
        self.gpu_throttled = OptionalGauge(
            "vecmill_gpu_throttled", "1 while the GPU is slower than it should be under load", registry=registry
        )
        self.ready = Gauge("vecmill_ready", "1 while requests are served", registry=registry)

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Read a gauge's value at scrape time."""
        gauge.set_function(read)

    def exposition(self, *, work: bool = True) -> bytes:
        """The registry in Prometheus text format; without `work`, less the lines that tell what had to be computed."""
        whole = generate_latest(self.registry)
        return whole if work else b"".join(line for line in whole.splitlines(keepends=True) if not OF_WORK.match(line))


Values = Mapping[str, float | None]


class OptionalGauge(Collector):
    """One sample for each value of `label` that `read` knows; without a label, for the value under the empty string."""

    def __init__(self, name: str, documentation: str, label: str | None = None, *, registry: CollectorRegistry) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._read: Callable[[], Values] = dict
        registry.register(self)

    def set_function(self, read: Callable[[], Values]) -> None:
        """Ask `read` whenever the metrics are."""
        self._read = read

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The gauge without values."""
        yield GaugeMetricFamily(self._name, self._documentation, labels=[self._label] if self._label else [])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauge with what is known now."""
        for family in self.describe():
            for value_of_label, value in self._read().items():
                if value is not None:
                    family.add_metric([value_of_label] if self._label else [], value)
            yield family


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
        return self._record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        record = self._record
        record.total, record.at = perf_counter() - record.arrived, monotonic()
        if error is not None:
            record.outcome = outcome_of(error)
        self._telemetry.ended(record)


class Telemetry:
    """Where the rooms above report. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.rolling = Rolling()
        self.rates = Rates()
        self.refusals = Refusals()
        self.knee_tokens = 0.0
        """Of the default model: with fewer tokens a forward pass takes about as long."""

    def recording(self, record: RequestRecord) -> Recording:
        """A context in which the request is worked on; its end is reported."""
        return Recording(self, record)

    def ended(self, record: RequestRecord) -> None:
        """An inference request has its result, or has failed."""
        if record.outcome is not Outcome.OK or record.lane is None:
            return
        operation, model = record.operation, record.model
        self.metrics.requests.labels(operation, model).inc()
        self.metrics.texts.labels(operation, model).inc(record.texts)
        self.metrics.tokens.labels(operation, model).inc(record.tokens)
        self.metrics.truncated.labels(model).inc(record.truncated)
        self.metrics.cached_texts.labels(operation, model).inc(record.cached)
        self.metrics.cached_tokens.labels(operation, model).inc(record.cached_tokens)
        for stage in ("total", "tokenize", "queue", "forward"):
            seconds = getattr(record, stage)
            self.metrics.request_seconds.labels(operation, record.lane.value, stage).observe(seconds)
        self.rolling.add_request(record)
        searches = int(record.lane is Lane.INTERACTIVE)
        work = Work(record.texts, record.tokens, 1, searches, record.cached, record.cached_tokens)
        self.rates.answered(work, UserId(record.owner, record.client, record.job), record.total)

    def batch(self, lane: Lane, rows: int, tokens: int, seconds: float, splits: int) -> None:
        """A batch ended; it was halved `splits` times for lack of memory."""
        self.rates.forward_pass(tokens, seconds, self.knee_tokens)
        self.metrics.batch_rows.labels(lane.value).observe(rows)
        self.metrics.batch_tokens.labels(lane.value).observe(tokens)
        self.metrics.batch_seconds.labels(lane.value).observe(seconds)
        self.metrics.splits.inc(splits)
        self.rolling.add_batch(rows)

    def error(self, status: int, kind: str, blame: Blame) -> None:
        """A request was answered with an error of this class."""
        self.metrics.errors.labels(str(status), kind).inc()
        self.rolling.errors += blame is Blame.SERVER
        self.rolling.refused += blame is Blame.LOAD
        self.rolling.client_errors += blame is Blame.CLIENT


SAMPLES = 1000


class Rolling:
    """Totals since the start and a window of recent samples. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.requests = 0
        self.texts = 0
        self.tokens = 0
        self.cached_texts = 0
        self.cached_tokens = 0
        self.searches = 0
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
        """Count an answered request."""
        self.requests += 1
        self.texts += request.texts
        self.tokens += request.tokens
        self.cached_texts += request.cached
        self.cached_tokens += request.cached_tokens
        self.queue_waits += request.waited
        self.searches += request.lane is Lane.INTERACTIVE
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
