"""/capabilities: what a client should know before its first batch.

And what /health, /capabilities and /stats all say of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from vecmill import __version__
from vecmill.core.types import ModelCard
from vecmill.hardware.gpu import GpuMemory, GpuReading, gpu_memory
from vecmill.hardware.memory import MEGABYTE, host_memory, meminfo
from vecmill.hardware.monitor import Look
from vecmill.http.services import Services, ServicesOf

router = APIRouter(tags=["TEI and CodeCartographer"])

READINGS = (
    "name",
    "uuid",
    "driver_version",
    "cuda_version",
    "compute_capability",
    "utilization_percent",
    "temperature_c",
    "power_watts",
    "power_limit_watts",
    "sm_clock_mhz",
    "max_sm_clock_mhz",
    "performance_state",
    "clock_reasons",
)
HANGING = "if `nvidia-smi` hangs too, only a restart of the machine helps; `sudo dmesg` may say why."


def gpu_facts(services: Services) -> dict[str, Any] | None:
    """The GPU, also one that is not used; None without one. Fields that nobody knows are null, never zero.

    `stale`: the driver does not answer; what is said of memory was so `age_seconds` ago, and the rest is null.
    """
    look, in_use = services.gpu(), services.gpu_in_use()
    if not is_there(look, in_use=in_use):
        return None
    gpu = look.gpu or GpuReading(not_available={"all": look.reason or ""})
    return {
        **{name: getattr(gpu, name) for name in READINGS},
        "in_use": in_use,
        "stale": look.stale,
        "age_seconds": round(look.age_seconds, 1),
        "clock": {"state": look.clock.state.value, "message": look.clock.message},
        "memory": asdict(memory_of_gpu(services)),
        "not_available": gpu.not_available,
    }


def is_there(look: Look, *, in_use: bool) -> bool:
    """Whether the machine has a GPU, also one whose driver does not answer now."""
    return look.gpu is not None or in_use or look.stale


def memory_of_gpu(services: Services) -> GpuMemory:
    """The GPU's memory now."""
    look = services.gpu()
    return gpu_memory(look.gpu, look.memory, meminfo(), os.getpid())


def warnings(look: Look) -> list[str]:
    """What is wrong with the machine though requests are served, one sentence with the cure each."""
    if look.stale:
        return [f"{look.reason}: {HANGING}"]
    return [look.clock.message] if look.clock.bad else []


def recommended(services: Services) -> int:
    """Texts per request for this device and model, by what was found to fit."""
    return recommended_batch_size(max_batch_tokens(services) or 0, max_batch_size(services) or FEWEST)


def max_batch_tokens(services: Services) -> int | None:
    """Tokens of a bulk forward pass of the default model; None while loading."""
    return next((budget.max_batch_tokens for budget in services.inference.budgets.values()), None)


def max_batch_size(services: Services) -> int | None:
    """Rows of a forward pass of the default model; None while loading, where the setting does not say it."""
    rows = (budget.max_batch_size for budget in services.inference.budgets.values())
    return next(rows, services.settings.engine.max_batch_size)


def available_mb(services: Services) -> int | None:
    """Memory that the GPU could still take; None without one."""
    return memory_of_gpu(services).available_mb if services.gpu_in_use() else None


@router.get("/capabilities", summary="Capabilities")
async def capabilities(services: ServicesOf) -> dict[str, Any]:
    """Limits, the recommended batch and memory in MB; GPU fields are null without a GPU."""
    memory = services.gpu().memory
    host = host_memory()
    cards = services.inference.cards
    limits = services.settings.inference
    return {
        "version": __version__,
        "replica": services.replica,
        "gpu_total_mb": memory and memory.total_mb,
        "gpu_allocated_mb": memory and memory.allocated_mb,
        "gpu_reserved_mb": memory and memory.reserved_mb,
        "gpu_available_mb": available_mb(services),
        "unified_memory": memory and memory.unified,
        "gpu": gpu_facts(services),
        "model_memory_mb": loaded_bytes(services) // MEGABYTE,
        "max_batch_size": max_batch_size(services),
        "recommended_batch_size": recommended(services),
        "gpu_busy": services.device_busy(),
        "max_client_batch_size": limits.max_client_batch_size,
        "max_batch_tokens": max_batch_tokens(services),
        "max_model_len": cards[0].max_model_len if cards else None,
        "memory_total_mb": host.total_mb,
        "memory_available_mb": host.available_mb,
        "models": [card.id for card in cards],
        "deterministic": services.settings.model.deterministic,
        "dtypes": {name: card.dtype for name, card in _names(cards).items()},
        "forward_passes": {
            # A model's budget is the last that is known of it, once its first load is done.
            name: forward_pass(services, key)
            for name, key in ((name, card.key) for name, card in _names(cards).items())
            if key in services.inference.budgets
        },
    }


def loaded_bytes(services: Services) -> int:
    """What the loaded models take, graphs included."""
    residency = services.inference.residency
    return sum(each.memory_bytes for each in residency.residents.values()) if residency is not None else 0


def _names(cards: Sequence[ModelCard]) -> dict[str, ModelCard]:
    """Each model by its id, or by its key where a reranker has the id of an embedding model."""
    names: dict[str, ModelCard] = {}
    for card in cards:
        names[card.key if card.id in names else card.id] = card
    return names


def forward_pass(services: Services, key: str) -> dict[str, Any]:
    """What a forward pass of a model takes, by the line through what was measured, at warm-up and since (`changed_at`,
    a Unix time), and its budgets. `provisional`: it is measured again once nobody waits. `next_dtype`: the type that
    the weights get at the next start, where another has turned out to be faster; else null.

    Of a model that has been loaded, whether it is now or not.
    """
    warmed, budget = services.warmed()[key], services.inference.budgets[key]
    calibration = warmed.calibration
    return {
        "fixed_ms": round(1000 * calibration.fixed_seconds, 3),
        "us_per_token": round(1e6 * calibration.seconds_per_token, 2),
        "best_tokens_per_second": round(calibration.best_rate, 1),
        "changed_at": round(warmed.changed_at, 3),
        "provisional": warmed.is_provisional,
        "knee_tokens": calibration.knee_tokens,
        "max_batch_tokens": budget.max_batch_tokens,
        "max_batch_tokens_ms": round(1000 * calibration.seconds(budget.max_batch_tokens), 1),
        "free_tokens": budget.free_tokens,
        "compiled": warmed.compiled,
        "compile_reason": warmed.compile_reason,
        "next_dtype": warmed.next_dtype,
        "cuda_graphs": {
            "count": warmed.graphs,
            "max_tokens": warmed.graph_tokens,
            "memory_mb": warmed.graph_memory_bytes // MEGABYTE,
        },
        "measured": [
            {"tokens": tokens, "ms": round(1000 * taken, 3)}
            for tokens, taken in sorted(calibration.measured, reverse=True)
        ],
    }


# A chunk of code, on average.
TOKENS_PER_TEXT = 128
# A client that sends one request after another leaves the device idle in between: so many make little of that.
FORWARDS_PER_REQUEST = 4
FEWEST = 8


def recommended_batch_size(max_batch_tokens: int, max_batch_size: int) -> int:
    """Texts per request: four bulk forward passes of `max_batch_tokens`, as a multiple of 8.

    Never above a forward's rows. The device's memory is in it: `max_batch_tokens` is what warm-up found to fit, and it
    is lowered once a batch did not. What is free at the moment says nothing: torch keeps what the largest batch took.
    """
    texts = FORWARDS_PER_REQUEST * max_batch_tokens // TOKENS_PER_TEXT // FEWEST * FEWEST
    return max(1, min(max(texts, FEWEST), max_batch_size))
