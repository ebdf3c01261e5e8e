"""OpenAI's batches: a file of requests that the server works through by itself.

Source: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from vecmill.batches.record import BatchRecord
from vecmill.http.batch_lines import EndpointName
from vecmill.http.errors import documented
from vecmill.http.files import LONGEST_LIFE, SHORTEST_LIFE, After, listed, place_after
from vecmill.http.route import InferenceRoute, NewWork, ViewerOf, client_of
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["Batches"], route_class=InferenceRoute, responses=documented(503))

BatchId = Annotated[str, Path(description="The `id` that POST /v1/batches answered with.")]

HOUR = 3600.0
UNITS = {"h": HOUR, "d": 24 * HOUR}
LONGEST_WINDOW = 30 * 24 * HOUR
WINDOW = "must be hours or days, from `1h` to `30d`; OpenAI's own is `24h`"


Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16, fail_fast=True),
]


class ExpiresAfter(BaseModel):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_LIFE, le=LONGEST_LIFE)


class BatchBody(BaseModel):
    """Which file is to be worked through, and how."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0123456789abcdef0123456789abcdef",
                    "endpoint": "/v1/embeddings",
                    "completion_window": "24h",
                }
            ]
        }
    )

    input_file_id: str = Field(description="A file with the purpose `batch`.")
    endpoint: EndpointName = Field(description="The `url` of each of its lines; `/v1/rerank` is an extension.")
    completion_window: str = Field(
        description="Hours or days after which what is not done is given up: `24h` as OpenAI has it, or up to `30d`."
    )
    metadata: Metadata | None = Field(None, description="Up to 16 notes, given back as they are.")
    output_expires_after: ExpiresAfter | None = Field(
        None, description="When output and errors are deleted; left out: FILE_EXPIRES_DAYS."
    )

    @field_validator("completion_window")
    @classmethod
    def _of_hours_or_days(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9][0-9]{0,3}[hd]", value, re.ASCII) or window_seconds(value) > LONGEST_WINDOW:
            raise ValueError(WINDOW)
        return value


def window_seconds(window: str) -> float:
    """A completion window in seconds."""
    return int(window[:-1]) * UNITS[window[-1]]


def batch_object(batch: BatchRecord) -> dict[str, Any]:
    """OpenAI's object."""
    done = batch.progress
    moments = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    errors = [error.model_dump() for error in batch.errors]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        # They are there once the batch has ended.
        "output_file_id": batch.output_file_id if batch.ended else None,
        "error_file_id": batch.error_file_id if batch.ended else None,
        "created_at": int(batch.created_at),
        **{f"{moment}_at": _seconds(getattr(batch, f"{moment}_at")) for moment in moments},
        "request_counts": {"total": batch.total, "completed": done.completed, "failed": done.failed},
        "usage": {
            "input_tokens": done.tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": done.tokens,
        },
        "metadata": batch.metadata,
    }


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


@router.post("/v1/batches", summary="Create a batch", responses=documented(507))
async def create_batch(
    body: BatchBody, request: Request, services: ServicesOf, viewer: ViewerOf, new_work: NewWork
) -> dict[str, Any]:
    """Work through a file in the bulk lane, line by line, and write a file of answers and one of errors."""
    expires = body.output_expires_after
    batch = await services.batches.create(
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        window_seconds=window_seconds(body.completion_window),
        metadata=body.metadata,
        output_expires_seconds=None if expires is None else float(expires.seconds),
        viewer=viewer,
        client=client_of(request),
    )
    return batch_object(batch)


@router.get("/v1/batches", summary="List batches")
async def list_batches(
    services: ServicesOf, viewer: ViewerOf, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The newest first; a batch is forgotten FILE_EXPIRES_DAYS after it has ended."""
    ids = await services.batches.ids(viewer)
    start = place_after(ids, after)
    records = await services.batches.records(ids[start : start + limit], viewer)
    return listed([batch_object(record) for record in records], has_more=start + limit < len(ids))


@router.get("/v1/batches/{batch_id}", summary="Get a batch")
async def get_batch(batch_id: BatchId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """How far it is, and the ids of its files once it has ended."""
    return batch_object(await services.batches.get(batch_id, viewer))


@router.post("/v1/batches/{batch_id}/cancel", summary="Cancel a batch", responses=documented(409, 507))
async def cancel_batch(batch_id: BatchId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Stop after what is done, which stays; `cancelling` until its files are there."""
    return batch_object(await services.batches.cancel(batch_id, viewer))
