"""OpenAI: /v1/embeddings and /v1/models.

Source: https://platform.openai.com/docs/api-reference/embeddings and /models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from vecmill.core.errors import ModelNotFound
from vecmill.core.types import EmbedRequest, EmbedResult, ModelCard
from vecmill.http.caller import CallerOf, Priority, with_priority
from vecmill.http.dialects.inputs import EmbeddingInputs, Truncate, usage
from vecmill.http.dialects.prompt_fields import PromptFields
from vecmill.http.encoding import EncodingFormat, vectors_response
from vecmill.http.route import InferenceRoute
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["OpenAI"], route_class=InferenceRoute)

STARTED = int(time())


class EmbeddingsBody(PromptFields):
    """Keys that are not listed are ignored: every client adds some."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": ["What is Deep Learning?", "def add(a, b): return a + b"]}]}
    )

    input: EmbeddingInputs
    model: str | None = Field(None, description="Left out: the default model.")
    dimensions: int | None = Field(
        None, ge=1, description="First so many values, normalised again; where the model is trained for it."
    )
    encoding_format: EncodingFormat | None = Field(
        None, description="`float` (default), or `base64`: little-endian float32."
    )
    truncate: Truncate = None
    priority: Priority = None
    user: str | None = Field(None, description="Ignored.")


@router.post("/v1/embeddings", summary="Create embeddings")
async def create_embeddings(body: EmbeddingsBody, request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Texts to unit vectors, in input order."""
    result = await services.inference.embed(
        EmbedRequest(
            inputs=body.input,
            model=body.model,
            prompt=body.prompt_choice(),
            truncate=body.truncate,
            dimensions=body.dimensions,
            param="input",
            caller=with_priority(caller, body.priority),
        )
    )
    encoding = body.encoding_format or "float"
    return await vectors_response(request, result, partial(_embeddings, result), encoding)


def _embeddings(result: EmbedResult, rows: Sequence[object]) -> dict[str, object]:
    return {
        "object": "list",
        "model": result.model,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": usage(result),
    }


@router.get("/v1/models", summary="List models")
async def list_models(services: ServicesOf) -> dict[str, Any]:
    """The models that are loaded, the default first."""
    return {"object": "list", "data": [_model(card) for card in services.inference.cards]}


@router.get("/v1/models/{model:path}", summary="Retrieve a model")
async def retrieve_model(model: str, services: ServicesOf) -> dict[str, Any]:
    """One model by its id."""
    for card in services.inference.cards:
        if model in (card.id, *card.aliases):
            return _model(card)
    known = ", ".join(card.id for card in services.inference.cards) or "none yet"
    raise ModelNotFound(f"The model `{model[:200]}` does not exist here; these do: {known}.", param="model")


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
        "dtype": card.dtype,
        "prompts": dict(card.prompts),
        "aliases": list(card.aliases),
    }


def _sizes(possible: Sequence[int]) -> list[int] | dict[str, int]:
    return {"min": possible[0], "max": possible[-1]} if isinstance(possible, range) else list(possible)
