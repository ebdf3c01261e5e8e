"""A gauge whose value is not always known: what is not available is left out, for a 0 would be a lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

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
