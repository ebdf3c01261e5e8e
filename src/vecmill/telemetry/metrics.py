"""Every metric family that /metrics has: name, meaning, labels, and whether it tells of other keys' texts.

Names and types follow the conventions of Prometheus and OpenMetrics; the tests hold every family to the rules of
`promtool check metrics`. A label's values are the server's own: models that it lists, lanes, dialects, outcomes,
names of errors. Nothing that a client sends becomes one, so that there is a bound to the number of series.
Sources: https://prometheus.io/docs/practices/naming/ and
https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from vecmill import __version__
from vecmill.core.types import Outcome, PassRecord, RequestRecord

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = openmetrics.CONTENT_TYPE_LATEST

# Series that say when a counter was made: as many again, and Prometheus does not read them unless it is told to.
disable_created_metrics()  # type: ignore[no-untyped-call]

Values = Mapping[tuple[str, ...], float | None]
"""A family's values now, by the values of its labels; None where it is not known."""
Labels = Sequence[str]
QUALITY = re.compile(r"(0(\.[0-9]{0,3})?|1(\.0{0,3})?)", re.ASCII)

REQUEST = ("operation", "model", "lane", "dialect", "outcome")
MODEL = ("task", "model", "lane")
PASS = (*MODEL, "outcome")


@dataclass(frozen=True, slots=True)
class MetricDescription:
    """What one family of the server's own is."""

    name: str
    """As its samples are called; a histogram's end with `_bucket`, `_count` and `_sum`."""
    kind: str
    labels: Labels
    documentation: str
    of_work: bool
    """Whether it tells how much had to be computed."""


class Metrics:
    """The metrics of one server, in a registry of their own.

    Counters and histograms are told of what happens; a `Measured` family is read when the metrics are asked for.
    Families made with `work=True` tell how much had to be computed, and so what was in the cache: with several keys and
    a common cache they are shown to those alone who may know everything.

    `vecmill_build_info` has the replica's name, to be joined on Prometheus' own `instance`. With `everywhere` each
    sample has it too: then series stay apart also where several servers are scraped at one address.
    """

    def __init__(self, replica: str = "", *, everywhere: bool = False) -> None:
        self._replica = replica
        self._labels = {"replica": replica} if everywhere else {}
        self._registry = CollectorRegistry()
        self._work: set[str] = set()
        self.described: list[MetricDescription] = []
        """In the order of the exposition."""
        self._requests: dict[tuple[str, ...], tuple[list[Counter], list[Histogram]]] = {}
        self._passes: dict[tuple[str, ...], tuple[list[Counter], list[Histogram]]] = {}
        self._describe_server()
        self._describe_requests()
        self._describe_passes()
        self._describe_cache()
        self._describe_jobs()
        self._describe_machine()

    def _describe_server(self) -> None:
        versions = {
            "version": __version__,
            "python_version": platform.python_version(),
            "torch_version": version("torch"),
            "replica": self._replica,
        }
        build = "Versions of the server and of what it runs on, and its name among its replicas"
        Info("vecmill_build", build, registry=self._registry).info(versions)
        self._note("vecmill_build_info", "info", build, tuple(versions), work=False)
        # process_cpu_seconds_total and its like, by the names of every client library; empty but on Linux.
        ProcessCollector(registry=self._registry)
        self._work.add("process_cpu_seconds")
        self.ready = self._gauge("vecmill_ready", "1 while requests are served")
        self.http_in_flight = self._gauge(
            "vecmill_http_requests_in_flight", "HTTP requests that are being answered, streams included"
        )

    def _describe_requests(self) -> None:
        self.in_flight = self._gauge(
            "vecmill_requests_in_flight",
            "Inference requests that are worked on or wait for room",
            ("operation", "model", "lane"),
        )
        count, seconds = self._counter, self._histogram
        self._request_counters = [
            count("vecmill_requests", "Inference requests that ended", REQUEST),
            count("vecmill_texts", "Texts of those requests", REQUEST),
            count("vecmill_tokens", "Tokens of those texts, as far as they were counted", REQUEST),
            count("vecmill_truncated_texts", "Texts of which tokens were cut off", REQUEST),
            count("vecmill_cached_texts", "Texts answered with a vector that was kept", REQUEST, work=True),
            count("vecmill_cached_tokens", "Tokens of those texts", REQUEST, work=True),
        ]
        of_total = "Of vecmill_request_duration_seconds, "
        self._request_histograms = [
            seconds(
                "vecmill_request_duration_seconds",
                "From when an inference request was read until its result was ready, or it failed",
                REQUEST,
            ),
            seconds(
                "vecmill_request_queue_duration_seconds",
                of_total + "waiting for room and for the first forward pass to start",
                REQUEST,
                work=True,
            ),
            seconds(
                "vecmill_request_tokenize_duration_seconds",
                of_total + "tokenizing, and looking up vectors that were kept",
                REQUEST,
                work=True,
            ),
            seconds(
                "vecmill_request_forward_duration_seconds",
                of_total + "from the start of the first forward pass to the end of the last",
                REQUEST,
                work=True,
            ),
        ]
        self.errors = count("vecmill_errors", "HTTP requests answered with an error", ("dialect", "status", "error"))

    def _describe_passes(self) -> None:
        histogram = partial(self._histogram, labels=PASS, work=True)
        self._pass_histograms = [
            histogram("vecmill_batch_rows", "Rows of a forward pass", buckets=ROWS),
            histogram("vecmill_batch_tokens", "Tokens of a forward pass", buckets=TOKENS),
            histogram(
                "vecmill_batch_fill_ratio",
                "Tokens of a forward pass as a share of the most that one may hold",
                buckets=RATIOS,
            ),
            histogram("vecmill_batch_duration_seconds", "Time of a forward pass on the device"),
        ]
        self._splits = self._counter(
            "vecmill_out_of_memory_splits", "Batches halved because they did not fit into the device's memory", MODEL
        )
        self.queued_texts = self._gauge("vecmill_queued_texts", "Texts that wait for a forward pass", MODEL)
        self.queued_tokens = self._gauge("vecmill_queued_tokens", "Tokens of those texts", MODEL)
        read = self._read_counter
        self.computed_texts = read("vecmill_computed_texts", "Texts run on the device", MODEL, work=True)
        self.computed_tokens = read("vecmill_computed_tokens", "Tokens of those texts", MODEL, work=True)
        self.joined_texts = read(
            "vecmill_joined_texts", "Texts that waited for an equal one in place of being run", MODEL, work=True
        )
        self.abandoned_texts = read("vecmill_abandoned_texts", "Texts whose client left before they were run", MODEL)
        self.expired_texts = read("vecmill_expired_texts", "Texts whose deadline passed before they were run", MODEL)
        self.max_batch_tokens = self._gauge(
            "vecmill_max_batch_tokens", "Tokens of a bulk forward pass, at most", ("task", "model")
        )

        self.model_info = self._gauge(
            "vecmill_model_info", "1 for each model, with the type of its weights", ("task", "model", "dtype")
        )
        self.model_loaded = self._gauge("vecmill_model_loaded", "1 while the model is in memory", ("task", "model"))
        self.model_memory = self._gauge(
            "vecmill_model_memory_bytes",
            "What a loaded model takes: its weights, and its CUDA graphs",
            ("task", "model"),
        )

    def _describe_cache(self) -> None:
        self.cache_entries = self._gauge("vecmill_cache_entries", "Vectors in the cache", work=True)
        self.cache_bytes = self._gauge("vecmill_cache_bytes", "Bytes that they take", work=True)
        self.cache_dropped = self._read_counter(
            "vecmill_cache_dropped", "Vectors dropped for lack of room, least recently used first", work=True
        )
        self.cache_lost = self._read_counter("vecmill_cache_lost", "Vectors that could not be kept", work=True)
        self.cache_failing = self._gauge("vecmill_cache_failing", "1 while the cache cannot be used", work=True)

    def _describe_jobs(self) -> None:
        self.jobs = self._gauge("vecmill_jobs", "Jobs by state", ("state",))
        self.batches = self._gauge("vecmill_batches", "Batches in STATE_DIR by state", ("state",))
        self.batch_lines = self._counter(
            "vecmill_batch_lines", "Lines of batches that are answered and on disk", ("outcome",)
        )
        for outcome in ("completed", "failed"):  # from 0 on, so that the rate of the first lines is seen
            self.batch_lines.labels(outcome)

    def _describe_machine(self) -> None:
        gauge = self._gauge
        self.memory = gauge("vecmill_memory_bytes", "Memory of the machine: total, available, swap_used", ("kind",))
        self.memory_pressure = gauge(
            "vecmill_memory_pressure_ratio", "Share of the last ten seconds in which some process waited for memory"
        )
        self.gpu_memory = gauge(
            "vecmill_gpu_memory_bytes",
            "Memory of the GPU, the machine's own where it is unified: total, available, allocated, reserved, "
            "this_process, other_processes",
            ("kind",),
        )
        self.gpu_utilization = gauge("vecmill_gpu_utilization_ratio", "Share of the time in which a kernel ran")
        self.gpu_temperature = gauge("vecmill_gpu_temperature_celsius", "Temperature of the GPU")
        self.gpu_power = gauge("vecmill_gpu_power_watts", "Power that the GPU draws")
        self.gpu_clock = gauge("vecmill_gpu_sm_clock_hertz", "Clock of the GPU's cores")
        self.gpu_throttled = gauge("vecmill_gpu_throttled", "1 while the GPU is slower than it should be under load")

    def request_ended(self, record: RequestRecord) -> None:
        """An inference request has its result, or has failed."""
        labels = (record.operation, record.model, record.lane or "", record.dialect, record.outcome)
        durations = [record.total]
        if record.lane is not None:
            durations.append(record.queue)
        if record.outcome is Outcome.OK:  # else it is not known how far the other stages got
            durations += [record.tokenize, record.forward]
        children = self._requests.get(labels)
        if children is None:
            histograms = self._request_histograms[: len(durations)]
            children = self._requests[labels] = _children(self._request_counters, histograms, labels)
        counters, histograms = children
        amounts = (1, record.texts, record.tokens, record.truncated, record.cached, record.cached_tokens)
        for counter, amount in zip(counters, amounts, strict=True):
            counter.inc(amount)
        for histogram, seconds in zip(histograms, durations, strict=True):
            histogram.observe(seconds)

    def pass_ended(self, batch: PassRecord) -> None:
        """A forward pass is over."""
        outcome = Outcome.ERROR if batch.failed else Outcome.OK
        labels = (*batch.model.split(":", 1), batch.lane, outcome)
        children = self._passes.get(labels)
        if children is None:
            children = self._passes[labels] = _children([], self._pass_histograms, labels)
        for histogram, value in zip(children[1], (batch.rows, batch.tokens, batch.fill, batch.seconds), strict=True):
            histogram.observe(value)
        self._splits.labels(*labels[:-1]).inc(batch.splits)

    def exposition(self, accept: str = "", *, work: bool = True) -> tuple[bytes, str]:
        """The metrics and their media type: OpenMetrics where an Accept header prefers it, else Prometheus's text.

        Without `work`, less the families that tell what had to be computed.
        """
        shown = _Shown(self._registry, frozenset() if work else frozenset(self._work), self._labels)
        if prefers_openmetrics(accept):
            return openmetrics.generate_latest(shown), OPENMETRICS  # type: ignore[no-untyped-call]
        return generate_latest(shown), TEXT_FORMAT

    def families(self) -> list[Metric]:
        """Every family with its samples of now."""
        return list(self._registry.collect())

    def _counter(self, name: str, documentation: str, labels: Labels, *, work: bool = False) -> Counter:
        self._note(f"{name}_total", "counter", documentation, labels, work=work)
        return Counter(name, documentation, labels, registry=self._registry)

    def _histogram(
        self,
        name: str,
        documentation: str,
        labels: Labels,
        *,
        buckets: Sequence[float] = SECONDS,
        work: bool = False,
    ) -> Histogram:
        self._note(name, "histogram", documentation, labels, work=work)
        return Histogram(name, documentation, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, documentation: str, labels: Labels = (), *, work: bool = False) -> Measured:
        self._note(name, "gauge", documentation, labels, work=work)
        return Measured(GaugeMetricFamily, name, documentation, labels, self._registry)

    def _read_counter(self, name: str, documentation: str, labels: Labels = (), *, work: bool = False) -> Measured:
        self._note(f"{name}_total", "counter", documentation, labels, work=work)
        return Measured(CounterMetricFamily, name, documentation, labels, self._registry)

    def _note(self, name: str, kind: str, documentation: str, labels: Labels, *, work: bool) -> None:
        self.described.append(MetricDescription(name, kind, labels, documentation, work))
        if work:
            self._work.add(name.removesuffix("_total"))


def _children(
    counters: Sequence[Counter], histograms: Sequence[Histogram], labels: Labels
) -> tuple[list[Counter], list[Histogram]]:
    """The series with these labels of each family. They are kept, because finding one takes longer than counting."""
    return [counter.labels(*labels) for counter in counters], [histogram.labels(*labels) for histogram in histograms]


class Measured(Collector):
    """A gauge or a counter that is read at each scrape: a sample for each value of its labels that is known."""

    def __init__(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        documentation: str,
        labels: Labels,
        registry: CollectorRegistry,
    ) -> None:
        self._kind, self._name, self._documentation, self._labels = kind, name, documentation, labels
        self._read: Callable[[], Values] = dict
        registry.register(self)

    def set_function(self, read: Callable[[], Values]) -> None:
        """Ask `read` whenever the metrics are asked for."""
        self._read = read

    def set_value(self, read: Callable[[], float | None]) -> None:
        """The same for a family without labels."""
        self._read = lambda: {(): read()}

    def describe(self) -> Iterator[Metric]:
        """The family without values."""
        yield self._kind(self._name, self._documentation, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        """The family with what is known now."""
        family = self._kind(self._name, self._documentation, labels=self._labels)
        for labels, value in self._read().items():
            if value is not None:
                family.add_metric(labels, value)
        yield family


class _Shown(Collector):
    """A registry without some of its families, and with labels that all samples have."""

    def __init__(self, registry: CollectorRegistry, hidden: frozenset[str], labels: Mapping[str, str]) -> None:
        self._registry, self._hidden, self._labels = registry, hidden, labels

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if family.name in self._hidden:
                continue
            if self._labels:  # a family is made anew for each scrape
                family.samples = [
                    sample._replace(labels={**sample.labels, **self._labels}) for sample in family.samples
                ]
            yield family


def prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics at least as much as for plain text (RFC 9110, section 12.5.1)."""
    weights: dict[str, float] = {}
    for offer in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in offer.split(";"))
        weight = next((part.removeprefix("q=") for part in parameters if part.startswith("q=")), "1")
        weights[kind] = max(weights.get(kind, 0.0), float(weight) if QUALITY.fullmatch(weight) else 0.0)
    weight_of_openmetrics = weights.get("application/openmetrics-text", 0.0)
    return weight_of_openmetrics > 0 and weight_of_openmetrics >= weights.get("text/plain", 0.0)
