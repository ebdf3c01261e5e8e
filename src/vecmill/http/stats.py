"""/stats, /metrics and /cache: what the server has done, the vectors it has kept, and what each gauge reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from vecmill import __version__
from vecmill.core.errors import NotAllowed, StateUnavailable
from vecmill.core.protocols import StoreFailed
from vecmill.core.types import Lane
from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.memory import MEGABYTE, host_memory
from vecmill.http.capabilities import gpu_facts, memory_of_gpu, warnings
from vecmill.http.route import ViewerOf
from vecmill.http.services import Services, ServicesOf, shows_work_of_all
from vecmill.inference.facade import Inference
from vecmill.inference.residency import ModelState, Resident
from vecmill.telemetry.metrics import Values
from vecmill.telemetry.telemetry import summary

logger = logging.getLogger(__name__)

router = APIRouter()


def cache_facts(services: Services) -> dict[str, Any] | None:
    """How full the cache is and what it was good for; None where there is none."""
    cache = services.cache()
    if cache is None:
        return None
    work = services.telemetry.rates.all_work
    return {
        "entries": cache.size.entries,
        "bytes": cache.size.bytes,
        "max_bytes": services.settings.cache.cache_max_bytes if services.settings.state.redis_url is None else None,
        "hits": work.cached_texts,
        "hit_tokens": work.cached_tokens,
        "written": cache.stats.written,
        "dropped": cache.stats.dropped,
        "lost": cache.stats.lost,
        "failing": cache.failing,
    }


@router.get("/cache", summary="Cache statistics", tags=["Cache"])
async def get_cache(request: Request, services: ServicesOf) -> dict[str, Any]:
    """Entries and bytes kept; hits, entries written, dropped and lost since the start.

    With several keys and a common cache the counts are for the scope `admin`: they tell of other keys' texts.
    """
    counts = cache_facts(services) if shows_work_of_all(request) else None
    return {"enabled": services.cache() is not None, **(counts or {})}


@router.delete("/cache", summary="Empty the cache", tags=["Cache"])
async def delete_cache(services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Forget every vector; needs a key with the scope `admin` where there are keys."""
    if not viewer.everything:
        raise NotAllowed("DELETE /cache is for keys with the scope `admin`: send such a key, or that of ADMIN_API_KEY.")
    cache = services.cache()
    if cache is None:
        return {"deleted": 0}
    try:
        return {"deleted": await asyncio.to_thread(cache.clear)}
    except StoreFailed as error:
        logger.error("the cache cannot be emptied (%s)", error)
        raise StateUnavailable("503: the cache is temporarily unavailable; the log says why. Try again.") from None


# These tell how much had to be computed, and so what was in the cache.
WORK = ("texts_cached", "tokens_cached", "texts_computed", "cache", "queue_waits", "texts_joined")


@router.get("/stats", summary="Statistics", tags=["Statistics"])
async def stats(request: Request, services: ServicesOf) -> dict[str, Any]:
    """Totals since the start; latencies over the last 1,000 requests. Rates: texts and tokens that were answered in the
    last minute, computed or from the cache.

    `errors` are the server's own, `refused` for lack of room or time, `client_errors` for what the request says.

    With several keys and a common cache, what would tell of other keys' texts is null but for the scope `admin`.
    """
    statistics = _stats(services)
    return statistics if shows_work_of_all(request) else statistics | dict.fromkeys(WORK)


def _stats(services: Services) -> dict[str, Any]:
    rolling, rates = services.telemetry.rolling, services.telemetry.rates
    work = rates.all_work
    latency = rolling.latency_ms("total")
    warmup = rolling.warmup_seconds
    scheduled = services.inference.stats
    gpu, host = services.gpu().memory, host_memory()
    return {
        "version": __version__,
        "requests": work.requests,
        "texts_embedded": work.texts,
        "tokens_embedded": work.tokens,
        "texts_cached": work.cached_texts,
        "tokens_cached": work.cached_tokens,
        "texts_computed": scheduled.sequences,
        "cache": cache_facts(services),
        "errors": rolling.errors,
        "refused": rolling.refused,
        "client_errors": rolling.client_errors,
        "queue_waits": rolling.queue_waits,
        "queue_depth": sum(services.inference.waiting.values()),
        "waiting": {lane.value: count for lane, count in services.inference.waiting.items()},
        "texts_joined": scheduled.joined,
        "texts_abandoned": scheduled.abandoned,
        "texts_expired": scheduled.expired,
        "out_of_memory_splits": scheduled.splits,
        "avg_latency_ms": latency["mean"],
        "p50_latency_ms": latency["p50"],
        "p95_latency_ms": latency["p95"],
        "latency_ms": {lane.value: rolling.latency_ms("total", lane) for lane in Lane},
        "warmup_avg_ms": round(1000 * sum(warmup) / len(warmup), 1) if warmup else None,
        "warmup_requests": len(warmup),
        "uptime_seconds": round(rolling.uptime, 1),
        "texts_per_second": round(rates.per_second(rates.minute.texts), 2),
        "tokens_per_second": round(rates.per_second(rates.minute.tokens), 1),
        "gpu_busy": services.device_busy(),
        "gpu_memory_total_mb": gpu and gpu.total_mb,
        "gpu_memory_allocated_mb": gpu and gpu.allocated_mb,
        "gpu_memory_reserved_mb": gpu and gpu.reserved_mb,
        "process_memory_mb": host.process_mb,
        "memory_total_mb": host.total_mb,
        "memory_available_mb": host.available_mb,
        "memory": asdict(host),
        "gpu": gpu_facts(services),
        "warnings": warnings(services.gpu()),
    }


@router.get("/stats/detailed", summary="Detailed statistics", tags=["Statistics"])
async def detailed(request: Request, services: ServicesOf) -> dict[str, Any]:
    """Where the time of the last 1,000 requests went, and how full the forward passes were."""
    rolling, rates = services.telemetry.rolling, services.telemetry.rates
    work = rates.all_work
    shown = shows_work_of_all(request)
    stages: Mapping[str, Callable[[], Mapping[str, float | None]]] = {
        "gpu": lambda: rolling.latency_ms("forward"),
        "queue": lambda: rolling.latency_ms("queue"),
        "tokenize": lambda: rolling.latency_ms("tokenize"),
        "overhead": lambda: rolling.latency_ms("overhead"),
        "per_text_gpu": rolling.per_text_ms,
    }
    return {
        "sample_count": rolling.sample_count,
        "latency_ms": {
            "total": rolling.latency_ms("total"),
            **{name: read() if shown else summary(()) for name, read in stages.items()},
        },
        "batch_sizes": {
            "distribution": rolling.batch_distribution() if shown else {},
            "recent_avg": rolling.recent_batch_rows() if shown else None,
        },
        "throughput": {
            "texts_per_second": round(rates.per_second(rates.minute.texts), 2),
            "tokens_per_second": round(rates.per_second(rates.minute.tokens), 1),
            "requests": work.requests,
            "texts": work.texts,
            "tokens": work.tokens,
        },
    }


@router.get("/metrics", summary="Prometheus metrics", tags=["Statistics"], response_class=Response)
async def metrics(request: Request, services: ServicesOf) -> Response:
    """Prometheus's text format, or OpenMetrics 1.0 where `Accept` asks for it. With several keys and a common cache,
    what would tell of other keys' texts is left out but for the scope `admin`."""
    accept = ",".join(request.headers.getlist("accept"))
    shown, media_type = services.telemetry.metrics.exposition(accept, work=shows_work_of_all(request))
    return Response(shown, headers={"Content-Type": media_type, "Vary": "Accept"})


def watch_gauges(services: Services, http_in_flight: Callable[[], int]) -> None:
    """Say where each family that is read at a scrape is read from."""
    metrics, inference = services.telemetry.metrics, services.inference
    metrics.ready.set_value(lambda: float(services.health.ready))
    metrics.http_in_flight.set_value(http_in_flight)
    metrics.queued_texts.set_function(lambda: _queued(services, 0))
    metrics.queued_tokens.set_function(lambda: _queued(services, 1))
    for family, counter in (
        (metrics.computed_texts, "sequences"),
        (metrics.computed_tokens, "tokens"),
        (metrics.joined_texts, "joined"),
        (metrics.abandoned_texts, "abandoned"),
        (metrics.expired_texts, "expired"),
    ):
        family.set_function(partial(_of_lanes, inference, counter))
    metrics.max_batch_tokens.set_function(
        lambda: {_task_and_model(key): budget.max_batch_tokens for key, budget in inference.budgets.items()}
    )
    metrics.memory.set_function(_memory)
    metrics.memory_pressure.set_value(_memory_pressure)
    _watch_models(services)
    _watch_gpu(services)


def _task_and_model(key: str) -> tuple[str, str]:
    task, _, model = key.partition(":")
    return task, model


def _watch_models(services: Services) -> None:
    metrics, inference = services.telemetry.metrics, services.inference

    def of_residents(value: Callable[[Resident], float]) -> Values:
        residents = inference.residency.residents if inference.residency is not None else {}
        return {
            _task_and_model(key): value(resident) for key, resident in residents.items() if key in inference.budgets
        }

    metrics.model_info.set_function(lambda: {(card.task.value, card.id, card.dtype): 1 for card in inference.cards})
    metrics.model_loaded.set_function(partial(of_residents, lambda resident: resident.state is ModelState.LOADED))
    metrics.model_memory.set_function(partial(of_residents, lambda resident: resident.memory_bytes))


def _queued(services: Services, what: int) -> Values:
    queued = services.inference.queued.items()
    return {(*_task_and_model(model), lane): counts[what] for (model, lane), counts in queued}


def _of_lanes(inference: Inference, counter: str) -> Values:
    counters = inference.stats.by_lane.items()
    return {(*_task_and_model(model), lane): getattr(of_lane, counter) for (model, lane), of_lane in counters}


def _memory() -> Values:
    host = host_memory()
    megabytes = {"total": host.total_mb, "available": host.available_mb, "swap_used": host.swap_used_mb}
    return {(kind,): value * MEGABYTE for kind, value in megabytes.items()}


def _memory_pressure() -> float | None:
    percent = host_memory().pressure_percent
    return None if percent is None else percent / 100


def _watch_gpu(services: Services) -> None:
    metrics = services.telemetry.metrics

    def of(value: Callable[[GpuReading], float | None]) -> Callable[[], float | None]:
        return lambda: value(services.gpu().gpu or GpuReading())

    metrics.gpu_memory.set_function(lambda: _gpu_memory(services))
    metrics.gpu_utilization.set_value(of(lambda gpu: gpu.utilization_ratio))
    metrics.gpu_temperature.set_value(of(lambda gpu: gpu.temperature_c))
    metrics.gpu_power.set_value(of(lambda gpu: gpu.power_watts))
    metrics.gpu_clock.set_value(of(lambda gpu: gpu.sm_clock_mhz and gpu.sm_clock_mhz * 1e6))
    metrics.gpu_throttled.set_value(lambda: _throttled(services))


def _gpu_memory(services: Services) -> Values:
    megabytes: dict[str, int | None] = asdict(memory_of_gpu(services))
    del megabytes["unified"]
    return {
        (name.removesuffix("_mb"),): None if value is None else value * MEGABYTE for name, value in megabytes.items()
    }


def _throttled(services: Services) -> float | None:
    look = services.gpu()
    return None if look.gpu is None else float(look.clock.bad)
