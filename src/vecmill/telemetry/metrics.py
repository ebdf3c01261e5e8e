"""Every Prometheus metric, declared in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


# Lines of what says how much had to be computed of what was asked.
OF_WORK = re.compile(
    rb"(# \w+ )?vecmill_(cache|computed|joined|batch_(rows|tokens|duration))"
    rb"|vecmill_request_duration_seconds\w*{[^}]*stage=\"(tokenize|queue|infer)\""
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
            "Time in the server by stage: total, tokenize, queue, infer",
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
        """The registry in Prometheus text format; without `work` not what says how much had to be computed."""
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
