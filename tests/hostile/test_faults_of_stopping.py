"""SIGTERM under load: whoever was connected is answered, with what was asked for or a 503; nobody is reset."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import serving
from tests.faults.conftest import NewService, new_service, tiny_model  # noqa: F401
from tests.faults.service import Service, until

CLIENTS = 16
PATIENCE = 20.0
BODY = json.dumps({"inputs": ["a text"] * 4}).encode()
ENDED = "the server ended"


class Client:
    """Sends one request after another until nobody listens any more; what came of each."""

    def __init__(self, service: Service, outcomes: Counter[str], *, keeps: bool, pause: float) -> None:
        self._port = int(service.url.rpartition(":")[2])
        self._outcomes = outcomes
        self._keeps = keeps
        self._pause = pause

    def __call__(self) -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
            try:
                while self._ask(connection) and self._keeps:
                    time.sleep(self._pause)
            except Exception as error:
                self._outcomes[f"{type(error).__name__}: {error}"] += 1
            finally:
                connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> bool:
        """Whether the connection can be used again."""
        connection.request("POST", "/embed", BODY, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        self._outcomes[str(answer.status)] += 1
        return not answer.will_close


def hammered(service: Service, client: Callable[[Counter[str]], Client]) -> Counter[str]:
    """What comes of requests sent without pause while the server is told to stop."""
    outcomes = Counter[str]()
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client(outcomes)) for _ in range(CLIENTS)]
        until(lambda: outcomes["200"] > CLIENTS)
        service.signal(signal.SIGTERM)
        for future in running:
            future.result(PATIENCE + 10)
    return outcomes


@pytest.mark.parametrize(
    ("keeps", "pause"),
    [
        pytest.param(False, 0.0, marks=pytest.mark.nightly),
        (True, 0.0),
        pytest.param(True, 0.3, marks=pytest.mark.nightly),
    ],
)
def test_nobody_is_reset(new_service: NewService, keeps: bool, pause: float) -> None:  # noqa: F811
    service = new_service()
    service.start()
    outcomes = hammered(service, lambda counts: Client(service, counts, keeps=keeps, pause=pause))
    assert set(outcomes) <= {"200", "503"}, outcomes
    until(lambda: "stopped after" in service.log())
    assert "Traceback" not in service.log()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/chat/completions", "/embed", "/nowhere"])
async def test_the_body_of_who_comes_too_late_is_taken(path: str) -> None:
    """Closing a connection with unread data in it resets it, and the client never gets the 503."""
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield b"x" * 65_536

    async with serving(generation_url="http://127.0.0.1:9") as client:
        app(client).state.server.begin_to_stop()
        headers = {"content-type": "multipart/form-data; boundary=b" if path == "/v1/files" else "application/json"}
        answer = await client.post(path, content=body(), headers=headers)
        assert answer.status_code in (400, 404, 503)
        assert answer.headers["connection"] == "close"
    assert taken == 50


def app(client: httpx.AsyncClient) -> Any:
    """The application that the client speaks to."""
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport)
    return transport.app
