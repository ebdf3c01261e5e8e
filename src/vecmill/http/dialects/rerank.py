"""Cohere's and Jina's rerank, on /v1/rerank and /rerank; one answer that both kinds of client read.

Source: https://docs.cohere.com/v1/reference/rerank and https://jina.ai/reranker/.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from vecmill.core.types import RerankRequest, RerankResult
from vecmill.http.caller import CallerOf, Priority, with_priority
from vecmill.http.dialects.inputs import LONGEST_INSTRUCTION, Documents, Truncate
from vecmill.http.encoding import json_response, result_headers
from vecmill.http.route import InferenceRoute
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["Rerank"], route_class=InferenceRoute)

RESULT_CHARACTERS = 64  # of an index and its score in JSON


class RerankBody(BaseModel):
    """Keys that are not listed are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": "How many people live in Berlin?",
                    "documents": ["Berlin has 3.5 million inhabitants.", "Berlin is known for its museums."],
                    "return_documents": True,
                }
            ]
        }
    )

    query: str
    documents: Documents
    model: str | None = Field(None, description="Left out: the default model.")
    top_n: int | None = Field(None, ge=0, description="Only the best so many; 0 or left out: all.")
    return_documents: bool | None = Field(None, description="Give each document back beside its score.")
    instruction: str | None = Field(
        None,
        max_length=LONGEST_INSTRUCTION,
        description="What makes a document relevant, in place of the model's default (Qwen3-Reranker).",
    )
    raw_scores: bool | None = Field(None, description="The model's own scale (logit or cosine) instead of 0..1.")
    truncate: Truncate = None
    priority: Priority = None


@router.post("/v1/rerank", summary="Rerank")
@router.post("/rerank", summary="Rerank", name="rerank_without_version")
async def rerank(body: RerankBody, request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Documents sorted by relevance to the query, best first."""
    result = await services.inference.rerank(
        RerankRequest(
            query=body.query,
            documents=[document["text"] for document in body.documents],
            model=body.model,
            truncate=body.truncate,
            instruction=body.instruction,
            raw_scores=bool(body.raw_scores),
            caller=with_priority(caller, body.priority),
        )
    )
    documents = sum(len(document["text"]) for document in body.documents) if body.return_documents else 0
    size = documents + RESULT_CHARACTERS * len(body.documents)
    return await json_response(request, partial(_ranking, body, result), result_headers(result), size=size)


def _ranking(body: RerankBody, result: RerankResult) -> dict[str, Any]:
    # Stable: documents of equal score keep the client's order.
    order = np.argsort(-result.scores, kind="stable")[: body.top_n or None].tolist()
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": float(result.scores[index])} for index in order
    ]
    if body.return_documents:
        for entry in results:
            entry["document"] = body.documents[entry["index"]]
    return {
        "id": f"rerank-{secrets.token_hex(8)}",
        "object": "rerank",
        "model": result.model,
        "results": results,
        "usage": {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens},
        "meta": {
            "api_version": {"version": "1"},
            "billed_units": {"search_units": 1, "total_tokens": result.prompt_tokens},
            "tokens": {"input_tokens": result.prompt_tokens},
            "method": result.method,
            "score": "raw" if body.raw_scores else "0..1",
        },
    }
