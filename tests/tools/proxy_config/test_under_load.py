"""Servers that stop, die and come back behind HAProxy and nginx under load: every request is answered, right."""

from __future__ import annotations

import random
import signal
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.faults.service import Service, until
from tests.tools.proxy_config.conftest import NewServices
from tests.tools.proxy_config.proxies import KINDS, Proxy, proxy

each_kind = pytest.mark.parametrize("kind", KINDS)
TEXTS = [f"text number {number}" for number in range(50)]
BIG = " ".join(["word"] * 40_000)  # 200 kB: more than a proxy keeps for another try
DRAIN_SECONDS = 3


CLOSED = (httpx.RemoteProtocolError, httpx.ReadError)
"""A connection that ended before any answer."""


class Load:
    """Clients that ask until they are stopped, each with one request at a time."""

    def __init__(self, url: str, expected: np.ndarray, *, big: bool) -> None:
        """`expected`: the texts' vectors. `big`: every eighth request is too large to be held."""
        self._url, self._expected, self._big = url, expected, big
        self._stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.closed: list[str] = []
        """Errors of connections that were closed without an answer; the request was sent a second time."""

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """While the block runs."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def check(self, running: Proxy, closed: int = 0) -> None:
        """All was answered, right, and at most so many connections of HAProxy were closed without an answer.

        HAProxy does that where it cannot ask again and the client's connection has carried requests before
        (`abort_keep_alive` in its http_ana.c): as RFC 9112, 9.3.1 has it, the client then sends again what may be done
        twice. It cannot where its tries are used up, or where the server is killed after it has begun its answer.
        """
        assert set(self.outcomes) == {"right"}, f"{self.outcomes}\n{running.log()[-4000:]}"
        assert len(self.closed) <= (closed if running.kind == "haproxy" else 0), self.closed

    def after(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = self.outcomes.total() + count
        until(lambda: self.outcomes.total() >= wanted)

    def _ask(self, number: int) -> None:
        choice = random.Random(number)
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                self.outcomes[self._once(client, choice)] += 1

    def _once(self, client: httpx.Client, choice: random.Random) -> str:
        index = choice.randrange(len(TEXTS))
        headers = choice.choice([{}, {"X-Job-ID": f"job-{choice.randrange(9)}"}, {"X-Priority": "bulk"}])
        more = [BIG] if self._big and choice.random() < 1 / 8 else []
        body = {"input": [TEXTS[index], *more]}
        try:
            answer = self._answer(client, body, headers)
        except httpx.TransportError as error:
            return f"{type(error).__name__} {'big' if more else 'small'}"
        if answer.status_code != httpx.codes.OK:
            return f"{answer.status_code} {'big' if more else 'small'} {answer.text[:200]}"
        got = np.asarray(answer.json()["data"][0]["embedding"])
        return "right" if np.allclose(got, self._expected[index], atol=1e-4) else "wrong"

    def _answer(self, client: httpx.Client, body: dict[str, list[str]], headers: dict[str, str]) -> httpx.Response:
        try:
            return client.post("/v1/embeddings", json=body, headers=headers)
        except CLOSED as error:
            self.closed.append(repr(error))
            return client.post("/v1/embeddings", json=body, headers=headers)


def load_on(running: Proxy, *, big: bool = False) -> Load:
    answer = running.http.post("/v1/embeddings", json={"input": TEXTS}).json()
    return Load(f"http://{running.listen}", np.asarray([row["embedding"] for row in answer["data"]]), big=big)


def urls(services: Sequence[Service]) -> list[str]:
    return [each.url for each in services]


def drained(service: Service) -> None:
    service.signal(signal.SIGTERM)
    assert service.ended_with() == 0


@each_kind
def test_one_of_two_is_killed(kind: str, new_services: NewServices, tmp_path: Path) -> None:
    services = new_services(2)
    with proxy(kind, tmp_path, urls(services)) as running:
        load = load_on(running)
        with load.running(4):
            load.after(20)
            services[0].kill()
            load.after(40)
    load.check(running, closed=4)


@pytest.mark.nightly
@each_kind
def test_one_of_two_drains(kind: str, new_services: NewServices, tmp_path: Path) -> None:
    services = new_services(2, DRAIN_SECONDS=str(DRAIN_SECONDS))
    with proxy(kind, tmp_path, urls(services)) as running:
        load = load_on(running)
        with load.running(4):
            load.after(20)
            drained(services[0])
            load.after(40)
    load.check(running)


@pytest.mark.nightly
def test_haproxy_drains_bodies_of_any_size(new_services: NewServices, tmp_path: Path) -> None:
    """They cannot be sent again, and need not be: HAProxy sees that a server is unready before it refuses any."""
    services = new_services(2, DRAIN_SECONDS=str(DRAIN_SECONDS))
    with proxy("haproxy", tmp_path, urls(services)) as running:
        load = load_on(running, big=True)
        with load.running(6):
            load.after(30)
            drained(services[0])
            load.after(30)
    load.check(running)


@pytest.mark.nightly
def test_nginx_drains_bodies_of_any_size_by_a_reload(new_services: NewServices, tmp_path: Path) -> None:
    services = new_services(2)
    with proxy("nginx", tmp_path, urls(services)) as running:
        load = load_on(running, big=True)
        with load.running(6):
            load.after(30)
            running.reload(urls(services)[1:])
            time.sleep(1)  # nginx says nowhere that its new workers have begun
            load.after(30)
            drained(services[0])
            load.after(30)
    load.check(running)


class Dying(socketserver.BaseRequestHandler):
    """Says that it is ready; any other request it reads, and closes the connection: it may have done it or not."""

    def handle(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received and (more := self.request.recv(65_536)):
            received += more
        if received.startswith(b"GET /ready"):
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif received:
            assert isinstance(self.server, DyingServer)
            self.server.asked.append(received.split()[1].decode())


class DyingServer(socketserver.ThreadingTCPServer):
    """Such a server, and the paths that it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Dying)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@each_kind
def test_what_may_change_something_is_sent_once(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(DyingServer()) for _ in range(2)]
        for server in servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
        running = stack.enter_context(proxy(kind, tmp_path, [server.url for server in servers]))

        def asked(path: str) -> tuple[int, int]:
            # On a connection of its own: HAProxy answers a later request by closing the connection.
            answer = httpx.post(f"http://{running.listen}{path}", json={"input": "x"})
            assert "try again" in answer.json()["detail"]
            return answer.status_code, sum(server.asked.count(path) for server in servers)

        assert asked("/v1/embeddings")[1] > 1
        for path in ("/jobs", "/v1/batches", "/v1/chat/completions"):
            # nginx looks again after a second at those that have failed: until then it would ask none.
            until(lambda: running.http.get("/ready").is_success)
            assert asked(path) == (502, 1)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@each_kind
def test_restarts_and_kills_for_long(kind: str, new_services: NewServices, tmp_path: Path) -> None:
    """Three servers; again and again one, by a seeded choice, is killed or drained, and started again."""
    services = new_services(3, DRAIN_SECONDS=str(DRAIN_SECONDS))
    choice = random.Random(20)
    with proxy(kind, tmp_path, urls(services)) as running:
        load = load_on(running)
        with load.running(12):
            kills = 0
            for _ in range(8):
                victim = choice.choice(services)
                if choice.random() < 1 / 2:
                    kills += 1
                    victim.kill()
                else:
                    drained(victim)
                load.after(200)
                victim.start()
                time.sleep(2)  # until it is asked again
                load.after(100)
    load.check(running, closed=12 * kills)
