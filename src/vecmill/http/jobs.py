"""/jobs and /progress: the indexing jobs that CodeCartographer drives. It takes 200 alone for success."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import count
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from vecmill.http.capabilities import recommended
from vecmill.http.encoding import EVENT_STREAM_DOCUMENTED, RETRY_EVENT, event_stream
from vecmill.http.errors import documented
from vecmill.http.route import JsonRoute, NewWork, ViewerOf
from vecmill.http.services import ServicesOf
from vecmill.jobs.job import JobStatus
from vecmill.jobs.views import ENDED_SHOWN

router = APIRouter(tags=["Jobs"], route_class=JsonRoute, responses=documented(503))
deprecated = APIRouter(tags=["Jobs"], route_class=JsonRoute)

# Proxies end connections that are silent for longer than a minute, some after 30 s.
KEEP_ALIVE_SECONDS = 15.0

JobId = Annotated[str, Path(description="The `job_id` that POST /jobs answered with.")]


class RegisterBody(BaseModel):
    """A job about to begin."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"project": "stdlib", "total_chunks": 1500, "instance_id": "codecart-4711"}]}
    )

    project: str = Field(max_length=500)
    total_chunks: int = Field(ge=0, le=1_000_000_000)
    instance_id: str = Field("", max_length=200)


class ProgressBody(BaseModel):
    """How many chunks are done."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"current": 64}]})

    current: int


class FailBody(BaseModel):
    """Why the client gave up."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"error": "the user closed the editor"}]})

    error: str = Field("failed by its client", max_length=2000)


class DeprecatedProgress(BaseModel):
    """The progress report that clients sent before there were jobs."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"current": 64, "total": 1500, "project": "stdlib"}]})

    current: int = Field(ge=0)
    total: int = Field(ge=0)
    project: str = Field("", max_length=500)


@router.post("/jobs", summary="Register a job")
@router.post("/jobs/register", summary="Register a job", name="register_job_alias")
async def register_job(body: RegisterBody, services: ServicesOf, viewer: ViewerOf, new_work: NewWork) -> dict[str, Any]:
    """Queue a job. Position 0: it is active, begin."""
    job = await services.jobs.register(body.project, body.total_chunks, body.instance_id, viewer)
    position = job["position"]
    return {
        "job_id": job["id"],
        "status": job["status"],
        "position": position,
        "queue_position": position,
        "message": "active, begin" if position == 0 else f"queued at position {position}",
        "recommended_batch_size": recommended(services),
    }


@router.get("/jobs", summary="List jobs")
async def list_jobs(
    services: ServicesOf,
    viewer: ViewerOf,
    limit: Annotated[int, Query(ge=1, le=1000, description="Ended jobs in `recent`, at the most.")] = ENDED_SHOWN,
    state: Annotated[JobStatus | None, Query(description="Only jobs in this state; the other lists are empty.")] = None,
    project: Annotated[str | None, Query(max_length=500, description="Only jobs of exactly this project.")] = None,
) -> dict[str, Any]:
    """Active, queued and those that ended last."""
    return await services.jobs.overview(limit, state, project, viewer)


@router.delete("/jobs/recent", summary="Forget ended jobs")
async def clear_recent(services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Empty the list of jobs that have ended."""
    return {"cleared": await services.jobs.clear_ended(viewer)}


@router.get("/jobs/events", summary="Follow jobs", response_class=StreamingResponse, responses=EVENT_STREAM_DOCUMENTED)
async def job_events(services: ServicesOf, viewer: ViewerOf) -> StreamingResponse:
    """An event `job`, whose data are as those of GET /jobs/{job_id}, for each open job and those that ended last; then
    one whenever a job changes."""
    return event_stream(_events(services.jobs.follow(KEEP_ALIVE_SECONDS, viewer)))


async def _events(changes: AsyncGenerator[list[bytes], None]) -> AsyncIterator[bytes]:
    numbers = count(1)
    yield RETRY_EVENT
    async with aclosing(changes):
        async for jobs in changes:
            events = (b"event: job\nid: %d\ndata: %b\n\n" % (next(numbers), job) for job in jobs)
            yield b"".join(events) or b": keep-alive\n\n"


@router.get("/jobs/{job_id}", summary="Get a job")
async def get_job(job_id: JobId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """One job; asking renews its lease."""
    return await services.jobs.get(job_id, viewer)


@router.post("/jobs/{job_id}/progress", summary="Report progress", responses=documented(409))
async def report_progress(job_id: JobId, body: ProgressBody, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Record how many chunks are done; renews the lease."""
    return await services.jobs.progress(job_id, body.current, viewer)


@router.post("/jobs/{job_id}/complete", summary="Complete a job", responses=documented(409))
async def complete_job(job_id: JobId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """The job is done; the next in the queue starts."""
    return await services.jobs.complete(job_id, viewer)


@router.post("/jobs/{job_id}/fail", summary="Fail a job", responses=documented(409))
async def fail_job(
    job_id: JobId, services: ServicesOf, viewer: ViewerOf, body: FailBody | None = None
) -> dict[str, Any]:
    """The client gave up; the next in the queue starts."""
    return await services.jobs.fail(job_id, (body or FailBody.model_validate({})).error, viewer)


@router.delete("/jobs/{job_id}", summary="Cancel a job", responses=documented(409))
@router.post("/jobs/{job_id}/cancel", summary="Cancel a job", name="cancel_job_alias", responses=documented(409))
async def cancel_job(job_id: JobId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """End a job that waits or runs; its client finds it `failed`, with the error `cancelled`."""
    return await services.jobs.cancel(job_id, viewer)


@deprecated.post("/progress", summary="Report progress (deprecated)", deprecated=True)
async def post_progress(body: DeprecatedProgress, request: Request, viewer: ViewerOf) -> dict[str, Any]:
    """Keep the last report; use /jobs instead."""
    reports = _reports(request)
    reports.pop(viewer.owner, None)
    reports[viewer.owner] = body.model_dump()
    return body.model_dump()


@deprecated.get("/progress", summary="Last progress (deprecated)", deprecated=True)
async def get_progress(request: Request, viewer: ViewerOf) -> dict[str, Any]:
    """The last report, or zeros."""
    empty = DeprecatedProgress(current=0, total=0, project="")
    mine = [report for owner, report in _reports(request).items() if viewer.sees(owner)]
    return mine[-1] if mine else empty.model_dump()


@deprecated.delete("/progress", summary="Clear progress (deprecated)", deprecated=True)
async def delete_progress(request: Request, viewer: ViewerOf) -> dict[str, Any]:
    """Forget the last report."""
    reports = _reports(request)
    for owner in [owner for owner in reports if viewer.sees(owner)]:
        del reports[owner]
    return {"cleared": True}


def _reports(request: Request) -> dict[str | None, dict[str, Any]]:
    """The last of each key, the newest at the end."""
    reports: dict[str | None, dict[str, Any]] = request.app.state.progress
    return reports
