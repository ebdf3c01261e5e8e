"""A route whose body is parsed fast and strictly, and whose work ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from vecmill.core.errors import InvalidInput, MalformedBody
from vecmill.http.errors import CLIENT_CLOSED_REQUEST
from vecmill.http.services import services_of

SURROGATE = re.compile("[\ud800-\udfff]")
BOM = "\ufeff".encode()  # which some write before their JSON, though it says nothing

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose `json()` is orjson, with the cause named where orjson refuses."""

    async def json(self) -> Any:
        """The body, parsed once.

        Raises:
            MalformedBody, InvalidInput: it is not JSON in valid Unicode.
        """
        if not hasattr(self, "_parsed"):
            body = (await self.body()).removeprefix(BOM)
            self._parsed = await services_of(self).threads.run_if_large(partial(_parse, body), size=len(body))
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


def _parse(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _diagnose(body, error) from None


def _diagnose(body: bytes, error: orjson.JSONDecodeError) -> Exception:
    """What orjson refuses and the standard library reads is a lone surrogate or a NaN: name the field."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return MalformedBody(f"The request body is not valid JSON: {error}.")
    for path, value in _leaves(parsed):
        if isinstance(value, str) and SURROGATE.search(value):
            return InvalidInput(
                f"`{path}` has half of a surrogate pair, which is no character: cut texts between characters, not "
                f"between UTF-16 units.",
                param=path,
            )
    return MalformedBody(f"The request body is not valid JSON: {error}. NaN and Infinity are not JSON.")


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (f"{path}.{key}".lstrip("."), key)
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value
