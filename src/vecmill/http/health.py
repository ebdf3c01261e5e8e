"""/health and /ready: what is so, for people, load balancers and the clients that read its fields."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from vecmill import __version__
from vecmill.core.health import Phase
from vecmill.core.types import Task
from vecmill.http.access import may_use
from vecmill.http.capabilities import gpu_facts, max_batch_size, warnings
from vecmill.http.errors import documented
from vecmill.http.services import Services, ServicesOf
from vecmill.inference.residency import ModelState

router = APIRouter(tags=["Health"])

LOOK_PATIENCE = 0.25  # seconds that /health waits, at the most, for the server at GENERATION_URL


@router.get("/health", summary="Health", responses=documented(503))
async def health(request: Request, services: ServicesOf, response: Response) -> dict[str, Any]:
    """200 when the server is ready, else 503; either way with the state, the models and the device.

    It is ready once the models of the start are loaded (READY_WHEN). Each that is not in `loading` answers earlier.

    Where there are keys, addresses, paths and what exactly failed are for their holders alone.
    """
    told = may_use(request)
    phase, percent, _ = services.health.snapshot()
    status, message = status_of(services)
    response.status_code = 200 if status == "ok" else 503
    return {
        "status": status,
        "percent": round(percent),
        "message": message if told or phase is not Phase.FAILED else "failed; the log says why",
        "version": __version__,
        # The default is the machine's name, which is not for strangers.
        "replica": services.replica if told or services.settings.http.replica is not None else None,
        **_models(services),
        **_gpu(services),
        **_state(services, told=told),
        "generation": await _generation(services, told=told),
        "warnings": warnings(services.gpu()),
    }


def status_of(services: Services) -> tuple[str, str]:
    """The state in one word, `ok` when the server is ready, and in one sentence."""
    phase, _, message = services.health.snapshot()
    if phase is Phase.READY and (hung := services.hung()) is not None:
        return "hung", hung
    return ("ok" if phase is Phase.READY else phase.value), message


@router.get("/ready", summary="Readiness", responses=documented(503))
async def ready(services: ServicesOf, response: Response) -> dict[str, Any]:
    """200 once the models of the start are loaded (READY_WHEN) and as long as requests are served, else 503."""
    is_ready = services.health.ready and services.hung() is None
    response.status_code = 200 if is_ready else 503
    return {"ready": is_ready}


def _models(services: Services) -> dict[str, Any]:
    """The default embedding model's card, flat as the clients read it, and all names; nulls while loading."""
    cards = services.inference.cards
    card = cards[0] if cards else None
    rerankers = [card.id for card in cards if card.task is Task.RERANK]
    return {
        "model": card and card.id,
        "dimensions": card and card.dimensions,
        "dtype": card and card.dtype,
        "dtype_reason": card and card.dtype_reason,
        "device": card and card.device,
        "max_batch_size": max_batch_size(services),
        "models": {"embed": card and card.id, "rerank": rerankers[0] if rerankers else card and card.id},
        "rerank_method": "cross_encoder" if rerankers else card.similarity if card else "cosine",
        "embedding_models": [card.id for card in cards if card.task is Task.EMBED],
        "rerank_models": rerankers,
        "loading": _loading(services),
    }


def _loading(services: Services) -> list[str]:
    """Models that are being loaded, or wait for it: a request that names one waits until it is there."""
    residency = services.inference.residency
    residents = residency.residents.values() if residency is not None else ()
    return [each.card.id for each in residents if each.state is ModelState.LOADING]


async def _generation(services: Services, *, told: bool) -> dict[str, Any] | None:
    """The server at GENERATION_URL, as it was found lately; what it is does not change ours."""
    if services.generation is None:
        return None
    state = await services.generation.state(LOOK_PATIENCE)
    return {"url": services.generation.url if told else None, "ok": state.ok, "message": state.message}


def _state(services: Services, *, told: bool) -> dict[str, Any]:
    """Whether what should outlive the process does; the server answers either way."""
    state = services.state()
    problems = {"state": "STATE_DIR is not open." if state is None else state.problem, **services.kept()}
    kept: dict[str, dict[str, Any]] = {
        name: {"ok": problem is None, "message": problem if told else None} for name, problem in problems.items()
    }
    kept["cache"]["enabled"] = services.cache() is not None
    return kept


def _gpu(services: Services) -> dict[str, Any]:
    memory = services.gpu().memory
    return {
        "cuda_available": services.gpu_in_use(),
        "gpu_memory_allocated_mb": memory and memory.allocated_mb,
        "gpu_memory_reserved_mb": memory and memory.reserved_mb,
        "gpu": gpu_facts(services),
    }
