"""A front as a server, before a handle that answers as Ray's does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from threading import Thread
from typing import Any, Self

import pytest

pytest.importorskip("ray", reason="needs the extra `ray`; `make test-ray` installs it")

import uvicorn

from tests.faults.service import until
from vecmill.cluster.front import Front, PlacementNames
from vecmill.config import load_settings
from vecmill.core.types import Task

BODY = b'{"data": []}'


class Answer:
    """The messages of an answer, and the end of the stream some time later, as from another process."""

    def __init__(self) -> None:
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
        start = {"type": "http.response.start", "status": 200, "headers": head}
        self._left: list[list[dict[str, Any]]] = [[start, {"type": "http.response.body", "body": BODY}]]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[dict[str, Any]]:
        await asyncio.sleep(0.01)
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()

    def cancel(self) -> None:
        self._left.clear()


class Handle:
    """Stands for Ray's `DeploymentHandle`."""

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def answer(self) -> Handle:
        return self

    def remote(self, *_: Any, **__: Any) -> Answer:
        return Answer()


@contextmanager
def serving(front: Front) -> Iterator[int]:
    """The front's port while the block runs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(front.__serve_build_asgi_app__(), lifespan="off", log_level="warning"))
        thread = Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            until(lambda: server.started)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_a_connection_has_one_request_after_another() -> None:
    """The server's side of a connection says that its client is gone as soon as an answer is sent."""
    placement = PlacementNames("models", frozenset({Task.EMBED}), frozenset())
    front = Front(load_settings(), [placement], {"models": Handle()})
    with serving(front) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        connection.connect()
        opened = connection.sock
        for _ in range(20):
            connection.request("POST", "/v1/embeddings", b'{"input": "a"}', {"Content-Type": "application/json"})
            assert connection.getresponse().read() == BODY
            assert connection.sock is opened
        connection.close()
