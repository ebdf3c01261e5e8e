"""Servers in threads: one that generates as vLLM and Ollama do, scripted by the test, and vecmill before it."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vecmill.app import create_app
from vecmill.config import load_settings

PATIENCE = 30.0  # seconds until a test that waits has failed

Answer = Callable[[Request], Awaitable[Response | ASGIApp]]


class Moment:
    """Something that happens in one thread and is awaited in another's event loop."""

    def __init__(self) -> None:
        self._happened: Future[None] = Future()

    def happen(self) -> None:
        """Now. Once is enough."""
        if not self._happened.done():
            self._happened.set_result(None)

    async def wait(self) -> None:
        """Until it has happened."""
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._happened)), PATIENCE)


def event(text: str) -> bytes:
    """One event of a streamed completion."""
    choice = {"index": 0, "text": text, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"id": "c", "object": "chunk", "created": 1, "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def generate(request: Request) -> Response:
    """What is asked for, in one piece or as a stream."""
    body = await request.json()
    if not body.get("stream"):
        choice = {"index": 0, "text": "once", "message": {"role": "assistant", "content": "once"}}
        return JSONResponse({"id": "c", "object": "x", "created": 1, "model": body["model"], "choices": [choice]})

    async def events() -> AsyncIterator[bytes]:
        for part in ("on", "ce"):
            yield event(part)
        yield DONE

    return StreamingResponse(events(), media_type="text/event-stream")


async def list_models(request: Request) -> Response:
    """Two models, described as vLLM does."""
    models = [
        {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 8192}
        for name in ("qwen/chat", "small")
    ]
    return JSONResponse({"object": "list", "data": models})


class GenerationServer:
    """Answers as the test says; remembers the headers of the requests to generate."""

    def __init__(self) -> None:
        self.url = ""
        self.generate: Answer = generate
        self.list_models: Answer = list_models
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/{path:path}", self._generate, methods=["GET", "POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return await self.list_models(request)  # type: ignore[return-value]

    async def _generate(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.paths.append(request.url.path)
        return await self.generate(request)  # type: ignore[return-value]


def cut_off(content_type: str, *chunks: bytes) -> ASGIApp:
    """A response whose connection breaks after the chunks."""

    async def response(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    return response


def listener() -> socket.socket:
    """A socket that takes connections on a free port, before anybody answers them."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@contextmanager
def serving_in_a_thread(app: Any, on: socket.socket) -> Iterator[str]:
    """The application behind uvicorn, over TCP; its address."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([on],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{on.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        on.close()
        assert not thread.is_alive()


@contextmanager
def generation_server() -> Iterator[GenerationServer]:
    """A generation server that runs while the block does."""
    server = GenerationServer()
    with serving_in_a_thread(server.app, listener()) as server.url:
        yield server


@contextmanager
def vecmill_before(generation_url: str, *, on: socket.socket | None = None, **flags: object) -> Iterator[str]:
    """vecmill without a model, which generation does not need; its address."""
    with tempfile.TemporaryDirectory() as state:
        settings = {"embed_model": "./nowhere", "device": "cpu", "state_dir": state, "generation_url": generation_url}
        with serving_in_a_thread(create_app(load_settings({**settings, **flags})), on or listener()) as url:
            yield url
