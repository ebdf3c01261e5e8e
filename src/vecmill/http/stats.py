"""/stats, /stats/detailed and /metrics: what the server has done."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from vecmill import __version__
from vecmill.core.types import Lane
from vecmill.hardware.memory import host_memory
from vecmill.http.cache import cache_facts
from vecmill.http.hardware import gpu_facts, warnings
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["Statistics"])


@router.get("/stats", summary="Statistics")
async def stats(services: ServicesOf) -> dict[str, Any]:
    """Totals since the start; rates over the last minute; latencies over the last 1,000 requests."""
    rolling = services.telemetry.rolling
    latency = rolling.latency_ms("total")
    texts_per_second, tokens_per_second = rolling.rates()
    warmup = rolling.warmup_seconds
    scheduled = services.inference.stats
    gpu, host = services.gpu().memory, host_memory()
    return {
        "version": __version__,
        "requests": rolling.requests,
        "texts_embedded": rolling.texts,
        "tokens_embedded": rolling.tokens,
        "texts_cached": rolling.cached_texts,
        "tokens_cached": rolling.cached_tokens,
        "texts_computed": scheduled.sequences,
        "cache": cache_facts(services),
        "errors": rolling.errors,
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
        "texts_per_second": round(texts_per_second, 2),
        "tokens_per_second": round(tokens_per_second, 1),
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


@router.get("/stats/detailed", summary="Detailed statistics")
async def detailed(services: ServicesOf) -> dict[str, Any]:
    """Where the time of the last 1,000 requests went, and how full the forward passes were."""
    rolling = services.telemetry.rolling
    texts_per_second, tokens_per_second = rolling.rates()
    return {
        "sample_count": rolling.sample_count,
        "latency_ms": {
            "total": rolling.latency_ms("total"),
            "gpu": rolling.latency_ms("infer"),
            "queue": rolling.latency_ms("queue"),
            "tokenize": rolling.latency_ms("tokenize"),
            "overhead": rolling.latency_ms("overhead"),
            "per_text_gpu": rolling.per_text_ms(),
        },
        "batch_sizes": {
            "distribution": rolling.batch_distribution(),
            "recent_avg": rolling.recent_batch_rows(),
        },
        "throughput": {
            "texts_per_second": round(texts_per_second, 2),
            "tokens_per_second": round(tokens_per_second, 1),
            "requests": rolling.requests,
            "texts": rolling.texts,
            "tokens": rolling.tokens,
        },
    }


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(services: ServicesOf) -> Response:
    """Prometheus text format."""
    return Response(services.telemetry.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
