"""OpenAI's /v1/models, and Infinity's /models with the fields that its client reads.

Source: https://platform.openai.com/docs/api-reference/models; https://michaelfeil.eu/infinity/
"""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Annotated, Any

from fastapi import APIRouter, Path

from vecmill.core.errors import ModelNotFound
from vecmill.core.types import ModelCard
from vecmill.http.capabilities import max_batch_size
from vecmill.http.services import Services, ServicesOf

router = APIRouter(tags=["OpenAI"])

STARTED = int(time())

ModelName = Annotated[
    str,
    Path(
        description="An id or an alias from the list.",
        openapi_examples={"bundled": {"value": "sentence-transformers/all-MiniLM-L6-v2"}},
    ),
]


@router.get("/v1/models", summary="List models")
async def list_models(services: ServicesOf) -> dict[str, Any]:
    """The models that are loaded, the default first; after them those of GENERATION_URL."""
    own = [_model(card) for card in services.inference.cards]
    taken = {model["id"] for model in own}
    return {"object": "list", "data": [*own, *(one for one in await _generating(services) if one["id"] not in taken)]}


@router.get("/v1/models/{model:path}", summary="Retrieve a model")
async def retrieve_model(model: ModelName, services: ServicesOf) -> dict[str, Any]:
    """One model by its id."""
    for card in services.inference.cards:
        if model in (card.id, *card.aliases):
            return _model(card)
    for generating in await _generating(services):
        if model == generating["id"]:
            return generating
    known = ", ".join(card.id for card in services.inference.cards) or "none yet"
    raise ModelNotFound(f"The model `{model[:200]}` does not exist here; these do: {known}.", param="model")


@router.get("/models", summary="List models", tags=["Infinity"])
async def list_infinity_models(services: ServicesOf) -> dict[str, Any]:
    """The models that are loaded; `owned_by` and `backend` are values that Infinity's client insists on."""
    queued = sum(services.inference.waiting.values())
    stats = {
        "queue_fraction": services.inference.admission.tokens / services.settings.inference.max_queued_tokens,
        "queue_absolute": queued,
        "results_pending": services.inference.admission.requests,
        "batch_size": max_batch_size(services),
    }
    fixed = {"owned_by": "infinity", "backend": "torch", "stats": stats}
    cards = services.inference.cards
    return {
        "object": "list",
        "data": [{**_model(card), **fixed, "capabilities": [card.task.value]} for card in cards],
    }


async def _generating(services: Services) -> tuple[dict[str, Any], ...]:
    return () if services.generation is None else await services.generation.models()


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": STARTED,
        "owned_by": "vecmill",
        "task": card.task.value,
        "family": card.family,
        "revision": card.revision,
        "dimensions": card.dimensions,
        "supported_dimensions": _sizes(card.supported_dimensions),
        "max_model_len": card.max_model_len,
        "pooling": card.pooling,
        "similarity": card.similarity if card.dimensions else None,
        "dtype": card.dtype,
        "prompts": dict(card.prompts),
        "prompts_from": card.prompts_from,
        "default_prompt_name": card.default_prompt_name,
        "aliases": list(card.aliases),
    }


def _sizes(possible: Sequence[int]) -> list[int] | dict[str, int]:
    return {"min": possible[0], "max": possible[-1]} if isinstance(possible, range) else list(possible)
