"""OpenAI: /v1/completions and /v1/chat/completions, passed through to GENERATION_URL.

Source: https://platform.openai.com/docs/api-reference/completions and /chat.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from http import HTTPStatus
from typing import Any

import httpx2
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vecmill.core.errors import GenerationUnavailable, NotFound, VecmillError
from vecmill.http.dialects.bodies import Dialect
from vecmill.http.dialects.openai import OPENAI
from vecmill.http.errors import (
    CLIENT_CLOSED_REQUEST,
    MOST_BYTES,
    blamed_for_another,
    bounded_body,
    dialect_of,
    documented,
    keep_refusal,
)
from vecmill.http.generation import Generation
from vecmill.http.request_log import ACCEPTABLE
from vecmill.http.route import check_new_work
from vecmill.http.services import Services, ServicesOf, services_of
from vecmill.refusals import message_of

logger = logging.getLogger(__name__)

router = APIRouter(tags=["OpenAI"])

# All else stays on its side: credentials and cookies, and what holds for one connection only.
UPWARD = ("content-type", "accept", "via", "traceparent", "tracestate")
DOWNWARD = (
    "content-type",
    "content-length",
    "content-encoding",
    "cache-control",
    "retry-after",
    "x-should-retry",
    "x-accel-buffering",
)
ERROR_BYTES = 1_048_576  # of an error's body; the rest is not read
SHOWN_CHARACTERS = 500
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")

UNSET = (
    "This server embeds and reranks; it generates no text. Set its GENERATION_URL to the address of an "
    "OpenAI-compatible server (vLLM, Ollama), and {path} is passed through to it."
)

UNANSWERED = {
    "404": {"description": "GENERATION_URL is not set; or that server does not have the model."},
    "429": {"$ref": "#/components/responses/429"},
    "502": {"description": "That server does not answer."},
    "504": {"description": "That server did not answer in time."},
}


def _documented(example: dict[str, Any]) -> dict[str, Any]:
    content = {"schema": {"type": "object", "additionalProperties": True}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}, "responses": UNANSWERED}


COMPLETION = _documented({"model": "default", "prompt": "Once upon a time", "max_tokens": 50})
CHAT = _documented({"model": "default", "messages": [{"role": "user", "content": "Hello"}], "stream": True})


@router.post("/v1/completions", summary="Create a completion", openapi_extra=COMPLETION, responses=documented(503))
async def create_completion(request: Request, services: ServicesOf) -> Response:
    """Passed through to GENERATION_URL, streams included."""
    return _pass_through(request, services, "/v1/completions")


@router.post("/v1/chat/completions", summary="Create a chat completion", openapi_extra=CHAT, responses=documented(503))
async def create_chat_completion(request: Request, services: ServicesOf) -> Response:
    """Passed through to GENERATION_URL, streams included."""
    return _pass_through(request, services, "/v1/chat/completions")


def _pass_through(request: Request, services: Services, path: str) -> Response:
    if services.generation is None:
        raise NotFound(UNSET.format(path=path))
    check_new_work(request)
    counted = services.inference.admission.counted_for_key(request.state.viewer.owner)
    headers = upward(request.headers)
    if (span := getattr(request.state, "span", None)) is not None:
        headers |= span.headers()
    return PassThrough(services.generation, path, headers, counted)


def upward(headers: Headers) -> dict[str, str]:
    """The headers of a client's request that the generation server gets.

    Values are ASCII: HTTP gives other bytes no meaning (RFC 9110, section 5.5), and what has none is left out.
    """
    sent = {name: headers[name] for name in UPWARD if name in headers and headers[name].isascii()}
    if ACCEPTABLE.fullmatch(request_id := headers.get("x-request-id", "")):
        sent["x-request-id"] = request_id
    length = headers.get("content-length", "")
    if length.isdecimal() and "transfer-encoding" not in headers:
        sent["content-length"] = length
    return sent


def downward(response: httpx2.Response) -> dict[str, str]:
    """The headers of the generation server's answer that the client gets, as far as they are ASCII."""
    headers = {name: response.headers[name] for name in DOWNWARD if name in response.headers}
    return {name: value for name, value in headers.items() if value.isascii()}


class RequestStream:
    """A request's body as it arrives; after it, whether the client is still there."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """
        Raises:
            ClientDisconnect: the client left before the end. And what the limit on bodies raises.
        """
        while not self._ended.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            if not message.get("more_body", False):
                self._ended.set()
            if body := message.get("body", b""):
                yield body

    def end(self) -> None:
        """Read no further: the answer is there. What still comes is dropped."""
        self._ended.set()

    async def client_left(self) -> None:
        """Return once the client is gone."""
        await self._ended.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class PassThrough(Response):
    """One exchange with the generation server. It ends when either side leaves."""

    def __init__(
        self, generation: Generation, path: str, headers: dict[str, str], counted: AbstractAsyncContextManager[None]
    ) -> None:
        """`counted` is entered for as long as it lasts."""
        super().__init__()
        self._counted = counted
        self._generation = generation
        self._path = path
        self._upward = headers
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._counted:
            await self._passed(scope, receive, send)

    async def _passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = RequestStream(receive)
        exchange = asyncio.create_task(self._exchange(upload, scope, receive, send))
        leaving = asyncio.create_task(upload.client_left())
        try:
            await asyncio.wait({exchange, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
                return
        except ClientDisconnect:
            pass
        finally:
            exchange.cancel()
            leaving.cancel()
            # The connection to the generation server is closed when both have ended.
            await asyncio.gather(exchange, leaving, return_exceptions=True)
        if not self._started:
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)

    async def _exchange(self, upload: RequestStream, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._generation.post(self._path, self._upward, upload)
        try:
            upload.end()
            if response.is_success:
                await self._relay(response, send)
            else:
                refusal = await self._refusal(response)
                self._report(Request(scope), refusal.status_code)
                self._started = True
                await refusal(scope, receive, send)
        finally:
            await response.aclose()

    @staticmethod
    def _report(request: Request, status: int) -> None:
        services_of(request).telemetry.error(
            status, "GenerationRefused", dialect_of(request), blamed_for_another(status)
        )
        keep_refusal(request, "generation_refused", status, "The server at GENERATION_URL refused the request.")

    async def _relay(self, response: httpx2.Response, send: Send) -> None:
        headers = downward(response)
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        self._started = True
        await send({"type": "http.response.start", "status": response.status_code, "headers": raw})
        tail = b""
        try:
            # Closed here also where the client leaves midway: the garbage collector would close it at any odd moment.
            async with aclosing(response.aiter_raw()) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    tail = (tail + chunk[-4:])[-4:]
        except httpx2.RequestError as error:
            failure = self._generation.failure(error)
            if not _takes_an_event(headers, tail):
                # The body stays unfinished, so the connection is closed and the client sees that it was cut off.
                return
            event = b"data: " + orjson.dumps(bounded_body(OPENAI, failure, HTTPStatus.BAD_GATEWAY)) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _refusal(self, response: httpx2.Response) -> Response:
        """An error as the generation server wrote it; in OpenAI's shape where it wrote something else, or too much."""
        status = response.status_code
        if not response.is_error:
            raise GenerationUnavailable(f"502: GENERATION_URL redirects ({status}); it must name the final address.")
        try:
            content = await _beginning(response)
        except httpx2.RequestError as error:
            raise self._generation.failure(error) from error
        headers = downward(response)
        for name in ("content-length", "content-encoding"):
            headers.pop(name, None)
        is_object = _is_object(content)
        if is_object and len(content) <= MOST_BYTES:
            return Response(content, status, headers)
        headers.pop("content-type", None)
        message = f"The generation server (GENERATION_URL) answered {status} {response.reason_phrase}".rstrip()
        if is_object:
            message += f": {message_of(content)}"
        elif response.headers.get("content-type", "").startswith("text/plain"):
            message += f": {content.decode(errors='replace')[:SHOWN_CHARACTERS].strip()}"
        return JSONResponse(bounded_body(OPENAI, VecmillError(message), status), status, headers)


def _takes_an_event(headers: dict[str, str], tail: bytes) -> bool:
    """Whether one more event would be understood: this is a stream of them, and none is half sent."""
    is_stream = headers.get("content-type", "").startswith("text/event-stream")
    return is_stream and "content-length" not in headers and (not tail or tail.endswith(EVENT_ENDS))


async def _beginning(response: httpx2.Response) -> bytes:
    content = b""
    async with aclosing(response.aiter_bytes()) as chunks:
        async for chunk in chunks:
            content += chunk
            if len(content) > ERROR_BYTES:
                break
    return content


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(orjson.loads(content), dict)
    except orjson.JSONDecodeError:
        return False


DIALECT = Dialect(router, OPENAI)
