"""text-embeddings-inference: /embed, with the `is_query` that CodeCartographer adds.

Source: https://huggingface.github.io/text-embeddings-inference/
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from vecmill.core.types import EmbedRequest
from vecmill.http.caller import CallerOf, Priority, of_job, with_priority
from vecmill.http.dialects.inputs import EmbeddingInputs, Truncate
from vecmill.http.dialects.prompt_fields import PromptFields
from vecmill.http.encoding import vectors_response
from vecmill.http.route import InferenceRoute
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["TEI and CodeCartographer"], route_class=InferenceRoute)


class EmbedBody(PromptFields):
    """Keys that are not listed are ignored."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": ["parse an ISO 8601 date"], "is_query": True}]}
    )

    inputs: EmbeddingInputs
    model: str | None = Field(None, description="Left out: the default model.")
    truncate: Truncate = None
    normalize: bool | None = Field(None, description="Unit vectors; true if left out.")
    dimensions: int | None = Field(None, ge=1, description="First so many values; where the model is trained for it.")
    priority: Priority = None
    job_id: str | None = Field(None, description="The indexing job this belongs to; renews its lease.")


@router.post("/embed", summary="Embed")
async def embed(
    body: EmbedBody,
    request: Request,
    services: ServicesOf,
    caller: CallerOf,
) -> Response:
    """Texts to a bare list of vectors, in input order. `X-Job-ID` may say what `job_id` says."""
    if body.job_id:
        caller = of_job(caller, body.job_id)
    if caller.job_id is not None:
        services.jobs.touch(caller.job_id)
    result = await services.inference.embed(
        EmbedRequest(
            inputs=body.inputs,
            model=body.model,
            prompt=body.prompt_choice(),
            truncate=body.truncate,
            dimensions=body.dimensions,
            normalize=body.normalize is not False,
            param="inputs",
            caller=with_priority(caller, body.priority),
        )
    )
    return await vectors_response(request, result, list)
