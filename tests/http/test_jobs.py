"""The jobs protocol on the wire, call by call as CodeCartographer makes it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import orjson
import pytest
from starlette.types import Message

from tests.conftest import serving


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A server of its own: one place, so that the second job waits."""
    async with serving(jobs_max_active=1) as client:
        yield client


@pytest.fixture(autouse=True)
async def no_jobs(client: httpx.AsyncClient) -> AsyncIterator[None]:
    yield
    listed = (await client.get("/jobs")).json()
    for job in listed["active"] + listed["queued"]:
        await client.delete(f"/jobs/{job['id']}")
    await client.delete("/jobs/recent")


async def register(client: httpx.AsyncClient, path: str = "/jobs", total: int = 100) -> dict[str, object]:
    body = {"project": "stdlib", "total_chunks": total, "instance_id": "codecart-1"}
    answer = await client.post(path, json=body)
    assert answer.status_code == 200  # the client takes no other code for success
    registered: dict[str, object] = answer.json()
    return registered


async def test_the_life_of_a_job(client: httpx.AsyncClient) -> None:
    job = await register(client)
    assert {"job_id", "status", "position", "message", "recommended_batch_size"} <= set(job)
    assert (job["status"], job["position"]) == ("active", 0)
    assert isinstance(job["recommended_batch_size"], int)
    address = f"/jobs/{job['job_id']}"
    assert (await client.post(f"{address}/progress", json={"current": 40})).status_code == 200
    seen = (await client.get(address)).json()
    assert (seen["status"], seen["current"], seen["percent"]) == ("active", 40, 40.0)
    assert {"id", "project", "total_chunks", "instance_id", "created_at", "started_at", "elapsed_seconds"} <= set(seen)
    assert {"eta_seconds", "chunks_per_second", "queue_position", "position"} <= set(seen)
    assert (await client.post(f"{address}/complete")).status_code == 200
    assert (await client.get(address)).json()["status"] == "completed"
    listed = (await client.get("/jobs")).json()
    assert (listed["active"], listed["queued"], [job["id"] for job in listed["recent"]]) == ([], [], [job["job_id"]])
    assert {"workers", "historical_rate"} <= set(listed)


async def test_a_second_job_waits_its_turn(client: httpx.AsyncClient) -> None:
    first, second = await register(client), await register(client, "/jobs/register")
    assert (second["status"], second["position"]) == ("queued", 1)
    waiting = (await client.get(f"/jobs/{second['job_id']}")).json()
    assert (waiting["status"], waiting["queue_position"], waiting["chunks_ahead"]) == ("queued", 1, 100)
    await client.post(f"/jobs/{first['job_id']}/complete")
    assert (await client.get(f"/jobs/{second['job_id']}")).json()["status"] == "active"


async def test_fail_takes_its_reason_from_the_json_body(client: httpx.AsyncClient) -> None:
    job = await register(client)
    assert (await client.post(f"/jobs/{job['job_id']}/fail", json={"error": "disk full"})).status_code == 200
    seen = (await client.get(f"/jobs/{job['job_id']}")).json()
    assert (seen["status"], seen["error"]) == ("failed", "disk full")
    other = await register(client)
    assert (await client.post(f"/jobs/{other['job_id']}/fail")).json()["error"] == "failed by its client"


@pytest.mark.parametrize(("method", "suffix"), [("DELETE", ""), ("POST", "/cancel")])
async def test_cancel(client: httpx.AsyncClient, method: str, suffix: str) -> None:
    job = await register(client)
    seen = (await client.request(method, f"/jobs/{job['job_id']}{suffix}")).json()
    assert (seen["status"], seen["error"]) == ("failed", "cancelled")


async def test_what_the_state_does_not_allow_is_a_4xx_that_says_why(client: httpx.AsyncClient) -> None:
    job = await register(client)
    address = f"/jobs/{job['job_id']}"
    for current in (-1, 101):
        answer = await client.post(f"{address}/progress", json={"current": current})
        assert answer.status_code == 400
        assert "0 to 100" in answer.json()["detail"]
    await client.post(f"{address}/complete")
    for call, body in (("complete", None), ("fail", None), ("cancel", None), ("progress", {"current": 3})):
        answer = await client.post(f"{address}/{call}", json=body)
        assert answer.status_code == 409
        assert answer.json()["detail"] == f"Job {job['job_id']} is completed already: `{call}` is not possible."


async def test_a_tagged_embed_belongs_to_its_job_and_an_unknown_tag_harms_nothing(client: httpx.AsyncClient) -> None:
    job = await register(client)
    for headers in ({"X-Job-ID": str(job["job_id"])}, {"X-Job-ID": "unknown"}):
        assert (await client.post("/embed", json={"inputs": ["x"]}, headers=headers)).status_code == 200


async def test_recent_can_be_cleared(client: httpx.AsyncClient) -> None:
    job = await register(client)
    await client.post(f"/jobs/{job['job_id']}/complete")
    assert (await client.delete("/jobs/recent")).json() == {"cleared": 1}
    assert (await client.get("/jobs")).json()["recent"] == []


async def test_the_list_can_be_narrowed(client: httpx.AsyncClient) -> None:
    done, running, waiting = [await register(client) for _ in range(3)]
    await client.post(f"/jobs/{done['job_id']}/complete")

    async def shown(**query: str | int) -> list[list[str]]:
        listed = (await client.get("/jobs", params=query)).json()
        assert set(listed) == {"active", "queued", "recent", "workers", "historical_rate"}
        return [[job["id"] for job in listed[name]] for name in ("active", "queued", "recent")]

    ids = [[job["job_id"]] for job in (running, waiting, done)]
    assert await shown() == await shown(limit=1, project="stdlib") == ids
    assert await shown(state="queued") == [[], ids[1], []]
    assert await shown(state="completed", limit=1000) == [[], [], ids[2]]
    assert await shown(state="failed") == await shown(project="std") == [[], [], []]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"state": "running"}, "state"),
    ],
)
async def test_a_filter_that_cannot_be_is_a_400_that_names_it(
    client: httpx.AsyncClient, query: dict[str, str], field: str
) -> None:
    answer = await client.get("/jobs", params=query)
    assert answer.status_code == 400
    assert f"`{field}`" in answer.json()["detail"]


async def test_a_client_that_leaves_at_once_has_reported_all_the_same(client: httpx.AsyncClient) -> None:
    """It sends and forgets: the connection may be gone before the answer."""
    job = await register(client)
    body = orjson.dumps({"current": 7})
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        """Nobody listens."""

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": f"/jobs/{job['job_id']}/progress",
        "raw_path": b"",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport)
    await transport.app(scope, receive, send)
    assert (await client.get(f"/jobs/{job['job_id']}")).json()["current"] == 7


async def test_the_deprecated_progress(client: httpx.AsyncClient) -> None:
    report = {"current": 3, "total": 10, "project": "p"}
    assert (await client.post("/progress", json=report)).json() == report
    assert (await client.get("/progress")).json() == report
    await client.delete("/progress")
    assert (await client.get("/progress")).json() == {"current": 0, "total": 0, "project": ""}
