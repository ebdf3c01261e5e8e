"""text-embeddings-inference: /embed, with the `is_query` that CodeCartographer adds.

Source: https://huggingface.github.io/text-embeddings-inference/
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from pydantic import ConfigDict, Field

from vecmill.core.types import EmbedRequest
from vecmill.http.dialects.inputs import EmbeddingInputs, Truncate, truncation_header
from vecmill.http.dialects.prompt_fields import PromptFields
from vecmill.http.encoding import json_response
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
    job_id: str | None = Field(None, description="The indexing job this belongs to; renews its lease.")


@router.post("/embed", summary="Embed")
async def embed(
    body: EmbedBody,
    request: Request,
    services: ServicesOf,
    x_job_id: Annotated[str | None, Header(description="As `job_id` in the body.")] = None,
) -> Response:
    """Texts to a bare list of vectors, in input order."""
    if job_id := body.job_id or x_job_id:
        services.jobs.touch(job_id)
    result = await services.inference.embed(
        EmbedRequest(
            inputs=body.inputs,
            model=body.model,
            prompt=body.prompt_choice(),
            truncate=body.truncate,
            dimensions=body.dimensions,
            normalize=body.normalize is not False,
            param="inputs",
        )
    )
    return await json_response(request, lambda: result.embeddings, truncation_header(result.truncated))
