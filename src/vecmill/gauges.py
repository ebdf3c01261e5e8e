"""Where the gauges of /metrics read their values when they are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from vecmill.core.types import Lane
from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.memory import MEGABYTE, host_memory
from vecmill.http.capabilities import memory_of_gpu
from vecmill.http.services import Services
from vecmill.telemetry.optional_gauge import Values


def watch(services: Services) -> None:
    """Tie every gauge that is read at a scrape to what it reads."""
    metrics, inference = services.telemetry.metrics, services.inference
    for lane in Lane:
        metrics.watch(metrics.waiting.labels(lane.value), partial(_waiting, services, lane))
    metrics.watch(metrics.joined, lambda: inference.stats.joined)
    metrics.watch(metrics.abandoned, lambda: inference.stats.abandoned)
    metrics.watch(metrics.expired, lambda: inference.stats.expired)
    metrics.watch(metrics.computed, lambda: inference.stats.sequences)
    metrics.watch(metrics.ready, lambda: float(services.health.ready))
    metrics.watch(metrics.process_memory, lambda: host_memory().process_mb * MEGABYTE)
    metrics.memory.set_function(_memory)
    metrics.memory_pressure.set_function(lambda: {"": _share(host_memory().pressure_percent)})
    _watch_gpu(services)


def watch_budgets(services: Services) -> None:
    """Those that there is one of for each model; once the models are loaded."""
    metrics, budgets = services.telemetry.metrics, services.inference.budgets
    for key in budgets:
        metrics.watch(
            metrics.max_batch_tokens.labels(*key.split(":", 1)),
            partial(lambda key: services.inference.budgets[key].max_batch_tokens, key),
        )


def _waiting(services: Services, lane: Lane) -> int:
    return services.inference.waiting[lane]


def _memory() -> Values:
    host = host_memory()
    found = {"total": host.total_mb, "available": host.available_mb, "swap_used": host.swap_used_mb}
    return {kind: value * MEGABYTE for kind, value in found.items()}


def _watch_gpu(services: Services) -> None:
    metrics = services.telemetry.metrics

    def of(value: Callable[[GpuReading], float | None]) -> Callable[[], Values]:
        return lambda: {"": value(services.gpu().gpu or GpuReading())}

    metrics.gpu_memory.set_function(lambda: _gpu_memory(services))
    metrics.gpu_utilization.set_function(of(lambda gpu: _share(gpu.utilization_percent)))
    metrics.gpu_temperature.set_function(of(lambda gpu: gpu.temperature_c))
    metrics.gpu_power.set_function(of(lambda gpu: gpu.power_watts))
    metrics.gpu_clock.set_function(of(lambda gpu: gpu.sm_clock_mhz and gpu.sm_clock_mhz * 1e6))
    metrics.gpu_throttled.set_function(lambda: {"": _throttled(services)})


def _gpu_memory(services: Services) -> Values:
    found: dict[str, int | None] = asdict(memory_of_gpu(services))
    del found["unified"]
    return {name.removesuffix("_mb"): None if value is None else value * MEGABYTE for name, value in found.items()}


def _throttled(services: Services) -> float | None:
    look = services.gpu()
    return None if look.gpu is None else float(look.clock.bad)


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
