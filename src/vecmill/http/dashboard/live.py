"""What the dashboard's page and `vecmill status` are told: the event stream, one snapshot, the history.

Nothing is computed while nobody reads. Readers that look at the same are given the same bytes, made once a tick.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from time import monotonic, thread_time, time
from typing import Annotated, Literal, cast

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from vecmill.core.errors import Overloaded
from vecmill.http.dashboard.sampling import Sampler
from vecmill.http.dashboard.snapshot import SnapshotQuery, Snapshots, SnapshotView
from vecmill.http.encoding import EVENT_STREAM_DOCUMENTED, RETRY_EVENT, event_stream
from vecmill.http.route import ViewerOf
from vecmill.http.services import shows_work_of_all
from vecmill.jobs.job import JobStatus
from vecmill.jobs.views import FOLLOWERS_MAX
from vecmill.telemetry.history import OF_WORK

TICK_SECONDS = 2.0
SPREAD, SPREAD_SECONDS = 16, 0.02  # readers wake one after another, so that they do not hold up the event loop together
LONGEST_REST = 0.25  # seconds between the snapshots of two views
SPANS = {"15m": 900.0, "24h": 86_400.0}
HIGHEST_PAGE = 1_000_000

router = APIRouter(tags=["Dashboard"])


class Live:
    """The readers of one server. Belongs to the event loop's thread."""

    def __init__(self, snapshots: Snapshots, sampler: Sampler) -> None:
        self._snapshots = snapshots
        self.sampler = sampler
        self._latest: dict[SnapshotView, tuple[int, asyncio.Task[bytes]]] = {}
        """Of each view that somebody looks at: the tick of its last snapshot, and the task that makes it."""
        self._one_at_a_time, self._rest = asyncio.Lock(), 0.0
        self._readers = 0
        self._ended = asyncio.Event()

    def end(self) -> None:
        """End every reader, and whoever begins to read."""
        self._ended.set()

    def follow(self, view: SnapshotView) -> AsyncGenerator[bytes, None]:
        """A snapshot at once, and one every tick, as JSON.

        Raises:
            Overloaded: there are too many readers.
        """
        if self._readers >= FOLLOWERS_MAX:
            raise Overloaded(f"The server is temporarily overloaded: {self._readers} dashboards are open.")
        return self._follow(view)

    async def _follow(self, view: SnapshotView) -> AsyncGenerator[bytes, None]:
        if self._readers >= FOLLOWERS_MAX:  # others came between the look and the first step
            return
        self._readers += 1
        delay = self._readers % SPREAD * SPREAD_SECONDS
        try:
            while not self._ended.is_set():
                snapshot = await self._of_this_tick(view)
                if self._ended.is_set():
                    return
                yield snapshot
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS - monotonic() % TICK_SECONDS + delay):
                        await self._ended.wait()
        finally:
            self._readers -= 1
            if not self._readers:
                self._latest.clear()

    async def _of_this_tick(self, view: SnapshotView) -> bytes:
        tick = int(monotonic() // TICK_SECONDS)
        latest = self._latest.get(view)
        if latest is None or (latest[0] != tick and latest[1].done()):
            self._latest = {
                key: entry for key, entry in self._latest.items() if entry[0] == tick or not entry[1].done()
            }
            latest = tick, asyncio.create_task(self._snapshot_after_rest(view), name="snapshot")
            self._latest[view] = latest
        return await asyncio.shield(latest[1])  # a reader that leaves must not end it for the others

    async def _snapshot_after_rest(self, view: SnapshotView) -> bytes:
        """Make a snapshot after a pause as long as the last one took: many views do not fill up the event loop."""
        async with self._one_at_a_time:
            await asyncio.sleep(self._rest)
            if self._ended.is_set():
                return b""
            began = thread_time()
            snapshot = await self.snapshot(view)
            self._rest = min(LONGEST_REST, thread_time() - began)
            return snapshot

    async def snapshot(self, view: SnapshotView) -> bytes:
        """A snapshot of now, as JSON."""
        return orjson.dumps(await self._snapshots.of(view))


async def _view_of(
    request: Request,
    viewer: ViewerOf,
    jobs_q: Annotated[
        str, Query(max_length=100, description="Only jobs with this in project, client or id, in whatever case.")
    ] = "",
    jobs_state: Annotated[
        Literal["", "queued", "active", "completed", "failed"], Query(description="Only jobs in this state.")
    ] = "",
    jobs_page: Annotated[int, Query(ge=1, le=HIGHEST_PAGE, description="Of 25 jobs each, from 1.")] = 1,
    batches_page: Annotated[int, Query(ge=1, le=HIGHEST_PAGE, description="Of 25 batches each, from 1.")] = 1,
) -> SnapshotView:
    status = JobStatus(jobs_state) if jobs_state else None
    query = SnapshotQuery(jobs_q.strip(), status, jobs_page, batches_page)
    return SnapshotView(viewer.owner, viewer.everything, shows_work_of_all(request), query)


ViewOf = Annotated[SnapshotView, Depends(_view_of)]


def live_of(request: Request) -> Live:
    """Of the application that serves this request."""
    return cast(Live, request.app.state.live)


@router.get(
    "/dashboard/events",
    summary="Follow the dashboard",
    response_class=StreamingResponse,
    responses=EVENT_STREAM_DOCUMENTED,
)
async def events(request: Request, view: ViewOf) -> StreamingResponse:
    """An event `snapshot` at once and every two seconds, whose data are as those of GET /dashboard/snapshot."""
    return event_stream(_events(live_of(request).follow(view)))


async def _events(snapshots: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    yield RETRY_EVENT
    async with aclosing(snapshots):
        async for snapshot in snapshots:
            yield b"event: snapshot\ndata: %b\n\n" % snapshot


@router.get("/dashboard/snapshot", summary="What the dashboard shows")
async def snapshot(request: Request, view: ViewOf) -> Response:
    """What goes on now: rates over the last minute, latencies, queues, users, jobs, batches, models, the machine.

    Unknown is null. A key without the scope `admin` sees its own jobs, batches, requests and refusals; what would tell
    of other keys' texts is null for it.
    """
    return Response(await live_of(request).snapshot(view), media_type="application/json")


@router.get("/dashboard/history", summary="The last 24 hours")
async def history(
    request: Request, span: Annotated[Literal["15m", "24h"], Query(description="How far back.")] = "15m"
) -> Response:
    """A value of each series for every ten seconds, or two minutes of `24h`; null where it is not known, as while the
    server did not run."""
    steps = live_of(request).sampler.history.span(SPANS[span], time())
    shown = steps.as_json(() if shows_work_of_all(request) else OF_WORK)
    return Response(orjson.dumps(shown), media_type="application/json")  # FastAPI takes long over 20,000 numbers
