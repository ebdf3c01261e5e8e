"""What routes begin with.

A body parsed fast and strictly, who asks and how urgently, and an end of the work when its client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BeforeValidator, Field

from vecmill.core.errors import NotAllowed, ShuttingDown
from vecmill.core.json_body import JsonLimits, parse
from vecmill.core.types import CacheControl, Caller, Lane, Viewer
from vecmill.http.bounds import Word, most_inputs
from vecmill.http.errors import CLIENT_CLOSED_REQUEST, dialect_of
from vecmill.http.hints import RouteNames, add_hints
from vecmill.http.services import address_of, services_of

BOM = "\ufeff".encode()  # which some write before their JSON, though it says nothing

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose `json()` is orjson, bounded, with the cause named where orjson refuses."""

    def __init__(self, request: Request, names: RouteNames) -> None:
        """`names`: those that requests of this route may have."""
        super().__init__(request.scope, request.receive)
        self._names = names
        names.look_at_head(self)

    async def json(self) -> Any:
        """The body, parsed once. From here on its lists may have as many inputs as the server's settings allow.

        Raises:
            BodyTooLarge: it holds too many values. MalformedBody, InvalidInput: it is not JSON in valid Unicode.
        """
        if not hasattr(self, "_parsed"):
            services = services_of(self)
            most = services.settings.inference.max_client_batch_size
            most_inputs.set(most)
            body = (await self.body()).removeprefix(BOM)
            read = partial(parse, body, JsonLimits.for_inputs(most))
            self._parsed = await services.threads.run_if_large(read, size=len(body))
            self._names.look_at_body(self, self._parsed)
        return self._parsed


def names_of_route(route: APIRoute) -> RouteNames:
    """The names that requests of a route may have."""
    return RouteNames(route.dependant, None if route.body_field is None else route.body_field.field_info)


class JsonRoute(APIRoute):
    """Parses with orjson. What was asked is done even if the client does not wait for the answer."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        names = names_of_route(self)

        async def handle_json(request: Request) -> Response:
            return add_hints(request, await handle(JsonRequest(request, names)))

        return handle_json


class InferenceRoute(APIRoute):
    """Parses with orjson; cancels the handler when the client disconnects, which frees its queued inputs."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        names = names_of_route(self)

        async def handle_until_disconnect(request: Request) -> Response:
            request = JsonRequest(request, names)
            await request.body()  # read before anybody else listens for messages
            return add_hints(request, await _until_disconnect(request, handle(request)))

        return handle_until_disconnect


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    handler = asyncio.create_task(work)
    disconnect = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({handler, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if handler.done():
            return handler.result()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        handler.cancel()
        disconnect.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_new_work(request: Request) -> None:
    """Refuse new work once the server is stopping, and from a key that is not for it.

    Raises:
        ShuttingDown, NotAllowed.
    """
    if getattr(request.state, "late", False):
        raise ShuttingDown
    if not getattr(request.state, "may_use", True):
        raise NotAllowed("This API key lacks the scope `use`, which work needs: send another, or give it that scope.")


async def _new_work(request: Request) -> None:
    check_new_work(request)


NewWork = Annotated[None, Depends(_new_work)]
"""A parameter of every route that takes work. What reads, reports or cancels is answered to the end."""


SHORTEST_TIMEOUT = 0.001  # seconds; no answer is so fast
LANES = f"must be {', '.join(lane.value for lane in Lane)}, or a whole number (negative: first, positive: bulk)"


def parse_priority(value: Any) -> Any:
    """The lane by its name, or by vLLM's number, where lower is earlier and 0 says nothing.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        name = value.strip().lower()
        if name in {lane.value for lane in Lane}:
            return Lane(name)
        value = int(name) if name.lstrip("+-").isdecimal() and name.isascii() else value
    if value is None or isinstance(value, Lane):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(LANES)
    if value == 0:
        return None
    return Lane.INTERACTIVE if value < 0 else Lane.BULK


Priority = Annotated[
    Lane | None,
    BeforeValidator(parse_priority),
    Word,
    Field(
        description="`interactive`: before all bulk; `bulk`: whenever there is room; or vLLM's number (lower is "
        "earlier, 0 says nothing). Left out: queries, reranking and up to 8 texts with 512 tokens that are of no "
        "indexing job are interactive."
    ),
]


LONGEST_JOB_ID = 100


async def _viewer_of(request: Request) -> Viewer:
    viewer: Viewer = request.state.viewer
    return viewer


ViewerOf = Annotated[Viewer, Depends(_viewer_of)]
"""A parameter of every route that shows or changes what belongs to a key."""


def client_of(request: Request) -> str:
    """Who takes turns with other clients: a key and an address, whatever else the request says of itself."""
    address, key = address_of(request), request.state.viewer.owner
    return f"{key}@{address}" if key else address


def _long_enough(seconds: float) -> float:
    if seconds < SHORTEST_TIMEOUT:
        raise ValueError(f"must be at least {SHORTEST_TIMEOUT:g} (seconds)")
    return seconds


Timeout = Annotated[
    float,
    AfterValidator(_long_enough),
    Field(allow_inf_nan=False),
]


def of_job(caller: Caller, job_id: str) -> Caller:
    """The caller as one of an indexing job, which takes turns with the client's other jobs."""
    return replace(caller, job_id=job_id[:LONGEST_JOB_ID])


# Async, as every dependency here: FastAPI calls others in a thread, which costs a request a twentieth of a millisecond.
async def caller_of(
    request: Request,
    new_work: NewWork,
    x_priority: Annotated[
        Priority, Header(description="As `priority` in the body, for clients that send headers.")
    ] = None,
    x_request_timeout: Annotated[
        Timeout | None,
        Header(description=f"Seconds, at least {SHORTEST_TIMEOUT}, until the answer is of no use: 504, texts not run."),
    ] = None,
    x_job_id: Annotated[str | None, Header(description="The indexing job this belongs to.")] = None,
    cache_control: Annotated[
        str | None, Header(description="`no-store`: neither look up nor keep vectors; `no-cache`: compute them anew.")
    ] = None,
) -> Caller:
    """Who asks."""
    caller = Caller(
        client=client_of(request),
        owner=request.state.viewer.owner,
        lane=x_priority,
        timeout=x_request_timeout,
        began=request.state.began,
        cache_control=_cache_control(cache_control or ""),
        may_unload=request.state.viewer.everything or not services_of(request).several_keys(),
        dialect=dialect_of(request),
        request_id=request.state.request_id,
        records=request.state.records,
    )
    return of_job(caller, x_job_id) if x_job_id else caller


def _cache_control(header: str) -> CacheControl:
    """The strictest of the directives that are known here.

    Source: https://www.rfc-editor.org/rfc/rfc9111#section-5.2.1
    """
    directives = {part.strip().lower() for part in header.split(",")}
    return next(
        (directive for directive in (CacheControl.NO_STORE, CacheControl.NO_CACHE) if directive in directives),
        CacheControl.ANY,
    )


CallerOf = Annotated[Caller, Depends(caller_of)]
