"""Server-sent events of the jobs, from a real server, as a browser or curl reads them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.servers import RunningServer, free_port, running, vecmill_command

PROMPT_SECONDS = 20.0  # far below SHUTDOWN_SECONDS, which a stream without an end would use up


@pytest.fixture
async def http(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server, with no jobs left on it from other tests."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        listed = (await client.get("/jobs")).json()
        for job in listed["active"] + listed["queued"]:
            await client.delete(f"/jobs/{job['id']}")
        await client.delete("/jobs/recent")
        yield client


class Events:
    """A stream of events, read one at a time."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self._lines = answer.aiter_lines()

    async def block(self) -> list[str]:
        """The lines up to the next empty one."""
        lines: list[str] = []
        async for line in self._lines:
            if not line:
                return lines
            lines.append(line)
        raise EOFError

    async def rest(self) -> None:
        """All that still comes. Raises EOFError at its end."""
        while True:
            await self.block()

    async def job(self) -> tuple[int, dict[str, Any]]:
        """The number of the next event and its job."""
        kind, number, data = await self.block()
        assert kind == "event: job"
        return int(number.removeprefix("id: ")), json.loads(data.removeprefix("data: "))

    async def until(self, job_id: str, **fields: object) -> dict[str, Any]:
        """The first event of a job with these values."""
        while True:
            _, job = await self.job()
            if job["id"] == job_id and fields.items() <= job.items():
                return job


@asynccontextmanager
async def following(client: httpx.AsyncClient, **headers: str) -> AsyncIterator[Events]:
    async with client.stream("GET", "/jobs/events", headers=headers) as answer:
        events = Events(answer)
        assert answer.status_code == 200
        assert await events.block() == ["retry: 2000"]
        yield events


async def register(client: httpx.AsyncClient, project: str = "p") -> str:
    answer = await client.post("/jobs", json={"project": project, "total_chunks": 10})
    job_id: str = answer.json()["job_id"]
    return job_id


async def test_first_what_is_then_what_changes(http: httpx.AsyncClient) -> None:
    ended, first, second, third = [await register(http, name) for name in "abcd"]
    await http.post(f"/jobs/{ended}/complete")
    async with asyncio.timeout(30), following(http) as events:
        found = dict([await events.job() for _ in range(4)])
        assert list(found) == [1, 2, 3, 4]
        assert [(job["id"], job["status"]) for job in found.values()] == [
            (ended, "completed"),
            (first, "active"),
            (second, "active"),
            (third, "queued"),
        ]
        await http.post(f"/jobs/{first}/progress", json={"current": 5})
        number, seen = await events.job()
        same = (await http.get(f"/jobs/{first}")).json()
        assert (number, seen["id"], seen["current"], set(seen)) == (5, first, 5, set(same))
        await http.post(f"/jobs/{first}/fail", json={"error": "why\nnot"})
        assert (await events.until(first, status="failed"))["error"] == "why\nnot"
        assert (await events.until(third, status="active"))["position"] == 0
        new = await register(http)
        assert (await events.until(new))["queue_position"] == 1
        await http.delete(f"/jobs/{second}")
        await events.until(new, status="active", queue_position=0)


async def test_events_are_neither_compressed_nor_held_back(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30), following(http, **{"Accept-Encoding": "gzip"}) as events:
        headers = events.answer.headers
        assert headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in headers
        assert headers["cache-control"] == "no-cache"
        job_id = await register(http)
        await events.until(job_id, status="active")


async def test_a_slow_reader_gets_the_newest_state(http: httpx.AsyncClient) -> None:
    job_id = await register(http)
    async with asyncio.timeout(60), following(http) as slow, following(http) as quick:
        for current in range(1, 11):
            await http.post(f"/jobs/{job_id}/progress", json={"current": current})
        await quick.until(job_id, current=10)
        await slow.until(job_id, current=10)


async def test_it_needs_a_key_and_ends_with_the_server() -> None:
    port = free_port()
    command = vecmill_command(port, "--torch-compile", "false", "--api-key", "a-quite-long-secret")
    with running(command, port, "/ready") as server:
        async with asyncio.timeout(PROMPT_SECONDS), httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            key = {"Authorization": "Bearer a-quite-long-secret"}
            for path in ("/jobs/events", "/dashboard/events"):
                assert (await client.get(path)).status_code == 401
            async with (
                following(client, **key) as events,
                client.stream("GET", "/dashboard/events", headers=key) as now,
            ):
                dashboard = Events(now)
                assert (await dashboard.block(), (await dashboard.block())[0]) == (["retry: 2000"], "event: snapshot")
                os.kill(server.pid, signal.SIGTERM)
                with pytest.raises(EOFError):
                    await events.block()
                with pytest.raises(EOFError):
                    await dashboard.rest()
