"""A route whose body is parsed fast and strictly, and whose work ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from vecmill.core.json_body import JsonLimits, parse
from vecmill.http.bounds import most_inputs
from vecmill.http.errors import CLIENT_CLOSED_REQUEST
from vecmill.http.services import services_of

BOM = "\ufeff".encode()  # which some write before their JSON, though it says nothing

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose `json()` is orjson, bounded, with the cause named where orjson refuses."""

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
        return self._parsed


class JsonRoute(APIRoute):
    """Parses with orjson. What was asked is done even if the client does not wait for the answer."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class InferenceRoute(APIRoute):
    """Parses with orjson; cancels the handler when the client disconnects, which frees its queued inputs."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_until_disconnect(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            await request.body()  # read before anybody else listens for messages
            return await _until_disconnect(request, handle(request))

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
