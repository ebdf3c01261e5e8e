"""/jobs/events: every change of a job as it happens.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import count

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from vecmill.http.caller import ViewerOf
from vecmill.http.services import ServicesOf

# Proxies end connections that are silent for longer than a minute, some after 30 s.
KEEP_ALIVE_SECONDS = 15.0
RETRY_MS = 2000

router = APIRouter(tags=["Jobs"])


@router.get(
    "/jobs/events",
    summary="Follow jobs",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events, without an end."}},
)
async def job_events(services: ServicesOf, viewer: ViewerOf) -> StreamingResponse:
    """An event `job`, whose data are as those of GET /jobs/{job_id}, for each open job and those that ended last; then
    one whenever a job changes."""
    return StreamingResponse(
        _events(services.jobs.follow(KEEP_ALIVE_SECONDS, viewer)),
        media_type="text/event-stream",
        # nginx holds answers back otherwise.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(changes: AsyncGenerator[list[bytes], None]) -> AsyncIterator[bytes]:
    numbers = count(1)
    yield f"retry: {RETRY_MS}\n\n".encode()
    async with aclosing(changes):
        async for jobs in changes:
            events = (b"event: job\nid: %d\ndata: %b\n\n" % (next(numbers), job) for job in jobs)
            yield b"".join(events) or b": keep-alive\n\n"
