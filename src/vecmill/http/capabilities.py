"""/capabilities: what a client should know before it sends its first batch."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from vecmill import __version__
from vecmill.hardware.memory import MEGABYTE, host_memory
from vecmill.hardware.recommendation import recommended_batch_size
from vecmill.http.services import Services, ServicesOf

router = APIRouter(tags=["TEI and CodeCartographer"])


def recommended(services: Services) -> int:
    """Texts per request for this device as it is now."""
    return recommended_batch_size(available_mb(services), services.settings.engine.max_batch_size)


def available_mb(services: Services) -> int | None:
    """Memory that the GPU could still take; None without one."""
    memory = services.device_memory()
    if memory is None:
        return None
    # One memory for CPU and GPU: what the kernel can still give is what the GPU can take.
    return host_memory().available_mb if memory.free_mb is None else memory.free_mb


@router.get("/capabilities", summary="Capabilities")
async def capabilities(services: ServicesOf) -> dict[str, Any]:
    """Limits, the recommended batch and memory in MB; GPU fields are null without a GPU."""
    memory = services.device_memory()
    host = host_memory()
    cards = services.inference.cards
    limits = services.settings.inference
    return {
        "version": __version__,
        "gpu_total_mb": memory and memory.total_mb,
        "gpu_allocated_mb": memory and memory.allocated_mb,
        "gpu_reserved_mb": memory and memory.reserved_mb,
        "gpu_available_mb": available_mb(services),
        "model_memory_mb": sum(card.weight_bytes for card in cards) // MEGABYTE,
        "max_batch_size": services.settings.engine.max_batch_size,
        "recommended_batch_size": recommended(services),
        "gpu_busy": services.device_busy(),
        "max_client_batch_size": limits.max_client_batch_size,
        "max_batch_tokens": services.max_batch_tokens(),
        "max_model_len": cards[0].max_model_len if cards else None,
        "memory_total_mb": host.total_mb,
        "memory_available_mb": host.available_mb,
        "models": [card.id for card in cards],
    }
