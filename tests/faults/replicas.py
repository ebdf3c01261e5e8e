"""Several servers at one Redis that are killed at random, and clients whose every answer is checked.

The servers load no model: jobs need none, and a killed one is back within a second.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Self

import httpx

from tests.faults.service import Service, service, until

LOADING = ("-m", "tests.slow_loading_server", "returns")
POLLS_PER_SECOND = 40.0  # of all clients together
REST = 3.0  # of what a call took: a machine that is too busy for all polls gets fewer, and no lease runs out
SECONDS_PER_PLACE = 0.25  # between two polls, where fewer are before a client: it begins soon after its turn has come
ABANDONED = "abandoned"
PATIENCE = 60.0  # seconds without any answer
REFUSED = httpx.codes.SERVICE_UNAVAILABLE


def answers(server: Service) -> bool:
    """Whether it answers calls of jobs."""
    try:
        return server.http.get("/jobs").is_success
    except httpx.TransportError:
        return False


@contextmanager
def replicas(count: int, model: Path, folder: Path, **settings: str) -> Iterator[Sequence[Service]]:
    """So many servers, each with a state folder of its own, that answer calls of jobs."""
    with service_stack(count, model, folder, settings) as servers:
        for server in servers:
            server.launch()
        for server in servers:
            until(partial(answers, server))
        yield servers


@contextmanager
def service_stack(count: int, model: Path, folder: Path, settings: dict[str, str]) -> Iterator[list[Service]]:
    if not count:
        yield []
        return
    state = folder / f"state-{count}"
    state.mkdir()
    with (
        service(model, state, folder / f"log-{count}", settings, serve=LOADING) as server,
        service_stack(count - 1, model, folder, settings) as others,
    ):
        yield [*others, server]


@dataclass
class Seen:
    """What the clients have seen, together."""

    places: int
    working: set[str] = field(default_factory=set)
    most_working: int = 0
    registered: list[str] = field(default_factory=list)
    """Ids that were answered."""
    completed: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    """Jobs whose clients went away while they were active."""
    instances: set[str] = field(default_factory=set)
    """Of every registration that was sent, answered or not."""
    statuses: Counter[int] = field(default_factory=Counter)
    broken: int = 0
    """Connections that a kill has cut."""

    def begin(self, job: str) -> None:
        self.working.add(job)
        self.most_working = max(self.most_working, len(self.working))
        assert len(self.working) <= self.places, f"{len(self.working)} clients work at one time"

    def end(self, job: str) -> None:
        self.working.discard(job)


class Crowd:
    """Clients that index, each call at whichever server."""

    def __init__(self, servers: Sequence[Service], seen: Seen, seed: int, clients: int) -> None:
        self._poll_seconds = clients / POLLS_PER_SECOND
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._servers = [httpx.AsyncClient(base_url=server.url, timeout=20, limits=limits) for server in servers]
        self._choose = random.Random(seed)
        self._took = 0.0  # seconds, the latest call of any client
        self.seen = seen

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            await server.aclose()

    async def index(self, number: int, *, silent: bool = False) -> None:
        """Register, wait for the turn, report, complete. A silent client goes away once its turn has come."""
        job = await self._register(number)
        position = None
        while (view := await self._call("GET", f"/jobs/{job}"))["status"] == "queued":
            assert position is None or view["position"] <= position, "a job was overtaken"
            position = view["position"]
            pause = min(self._poll_seconds, SECONDS_PER_PLACE * position)
            await asyncio.sleep(max(pause * (0.5 + self._choose.random()), REST * self._took))
        assert view["status"] == "active", view
        self.seen.begin(job)
        if silent:
            self.seen.silent.add(job)
            self.seen.end(job)
            return
        for current in (5, 10):
            view = await self._call("POST", f"/jobs/{job}/progress", {"current": current})
            assert (view["status"], view["current"]) == ("active", current)
        assert (await self._call("GET", f"/jobs/{job}"))["current"] == 10
        self.seen.end(job)  # before the request: the next may begin before its answer is here
        view = await self._call("POST", f"/jobs/{job}/complete", conflict_is_done=True)
        assert view["status"] == "completed"
        self.seen.completed.add(job)

    async def _register(self, number: int) -> str:
        """A registration whose answer was lost may have counted: it is sent again as another instance."""
        for attempt in range(1000):
            instance = f"{number}-{attempt}"
            self.seen.instances.add(instance)
            body = {"project": f"p{number}", "total_chunks": 10, "instance_id": instance}
            answer = await self._answer("POST", "/jobs", body)
            if answer is not None:
                self.seen.registered.append(answer["job_id"])
                return str(answer["job_id"])
        raise AssertionError("no server took a job")

    async def _call(self, method: str, path: str, body: object = None, *, conflict_is_done: bool = False) -> Any:
        began = monotonic()
        async with asyncio.timeout(PATIENCE):
            while True:
                answer = await self._answer(method, path, body, conflict_is_done=conflict_is_done)
                if answer is not None:
                    self._took = monotonic() - began
                    return answer
                await asyncio.sleep(0.05)

    async def _answer(self, method: str, path: str, body: object, *, conflict_is_done: bool = False) -> Any:
        """The JSON of a success; None where the server was killed, or says that it has no jobs now."""
        server = self._choose.choice(self._servers)
        try:
            answer = await server.request(method, path, json=body)
        except httpx.TransportError:
            self.seen.broken += 1
            await asyncio.sleep(0.05)
            return None
        self.seen.statuses[answer.status_code] += 1
        if answer.status_code == REFUSED:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["detail"].startswith("503")
            return None
        if answer.status_code == httpx.codes.CONFLICT and conflict_is_done:  # done before the answer was lost
            return await self._call("GET", path.rpartition("/")[0])
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()


async def kill_at_random(servers: Sequence[Service], seed: int, pause: float, stop: asyncio.Event) -> int:
    """Kill a server, start it again and wait until it answers, `pause` seconds apart, until `stop`; how many kills."""
    choose, kills = random.Random(seed), 0
    while not stop.is_set():
        try:
            async with asyncio.timeout(pause * (0.5 + choose.random())):
                await stop.wait()
        except TimeoutError:
            server = choose.choice(servers)
            await asyncio.to_thread(server.kill)
            kills += 1
            await asyncio.sleep(choose.random() * pause / 2)
            await asyncio.to_thread(server.launch)
            await asyncio.to_thread(until, partial(answers, server))
    return kills


def assert_first_come_first_served(jobs: Sequence[dict[str, Any]], places: int) -> None:
    """From the times of all jobs: they began in the order in which they came, and never more at one time."""
    began = [job for job in jobs if "started_at" in job]
    began.sort(key=lambda job: (job["created_at"], job["started_at"]))  # those of one commit came at one moment
    starts = [job["started_at"] for job in began]
    assert starts == sorted(starts)
    # Where one ends and another begins at one moment, the end is first.
    steps = [(job["started_at"], 1) for job in began] + [(job["completed_at"], -1) for job in began]
    active = 0
    for _, step in sorted(steps):
        active += step
        assert active <= places
