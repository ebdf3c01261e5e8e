"""Jobs beyond the process: a server that is killed, one whose Redis goes away, two on one folder."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from time import monotonic

import httpx
import pytest

from tests.conftest import serving
from tests.redis_server import redis_server
from tests.servers import free_port, running, vecmill_command

REGISTRATION = {"project": "p", "total_chunks": 100, "instance_id": "codecart-1"}


def test_a_client_goes_on_with_its_old_id_after_sigkill(tmp_path: Path) -> None:
    state = {"STATE_DIR": str(tmp_path)}
    port = free_port()
    command = vecmill_command(port, "--torch-compile", "false", "--jobs-max-active", "1")
    with running(command, port, "/health", state) as server:
        ids = [httpx.post(f"{server.url}/jobs", json=REGISTRATION).json()["job_id"] for _ in range(3)]
        httpx.post(f"{server.url}/jobs/{ids[0]}/progress", json={"current": 40}).raise_for_status()
        before = httpx.get(f"{server.url}/jobs").json()
        os.kill(server.pid, signal.SIGKILL)
    with running(command, port, "/health", state) as server:
        after = httpx.get(f"{server.url}/jobs").json()
        for name in ("active", "queued"):
            lasting = [
                [(job["id"], job["current"], job["position"], job["created_at"]) for job in listed[name]]
                for listed in (before, after)
            ]
            assert lasting[0] == lasting[1]
        seen = httpx.post(f"{server.url}/jobs/{ids[0]}/progress", json={"current": 50}).json()
        assert (seen["status"], seen["started_at"]) == ("active", before["active"][0]["started_at"])
        httpx.post(f"{server.url}/jobs/{ids[0]}/complete").raise_for_status()
        assert httpx.get(f"{server.url}/jobs/{ids[1]}").json()["status"] == "active"


async def test_without_redis_jobs_are_503_at_once_and_embedding_goes_on(tmp_path: Path) -> None:
    port = free_port()
    async with serving(redis_url=f"redis://127.0.0.1:{port}/0", cache_max_bytes=0) as client:
        with redis_server(tmp_path, port=port):
            while (registered := await client.post("/jobs", json=REGISTRATION)).status_code == 503:
                await asyncio.sleep(0.01)
            job_id = registered.json()["job_id"]
        began = monotonic()
        refused = await client.get(f"/jobs/{job_id}")
        assert refused.status_code == 503
        assert "temporarily" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) > 0
        for _ in range(3):
            embedded = await client.post("/embed", json={"inputs": ["x"], "job_id": job_id})
            assert embedded.status_code == 200
        assert monotonic() - began < 5
        assert 'vecmill_jobs{state="active"} 1.0' in (await client.get("/metrics")).text
        assert (await client.get("/health")).status_code == 200
        with redis_server(tmp_path, port=port):
            while (answer := await client.get(f"/jobs/{job_id}")).status_code == 503:
                await asyncio.sleep(0.01)
            assert answer.json()["status"] == "active"


async def test_two_servers_share_their_jobs_where_redis_is_set(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        flags = {"redis_url": url, "cache_max_bytes": 0, "jobs_max_active": 1}
        async with serving(**flags) as client_a, serving(**flags) as client_b:
            first, second = [(await client.post("/jobs", json=REGISTRATION)).json() for client in (client_a, client_b)]
            assert (first["position"], second["position"]) == (0, 1)
            assert (await client_b.post(f"/jobs/{first['job_id']}/complete")).status_code == 200
            assert (await client_a.get(f"/jobs/{second['job_id']}")).json()["status"] == "active"


async def test_a_second_server_on_one_folder_says_so_and_the_first_goes_on(tmp_path: Path) -> None:
    async with serving(state_dir=str(tmp_path)) as first:
        job_id = (await first.post("/jobs", json=REGISTRATION)).json()["job_id"]
        async with serving(state_dir=str(tmp_path)) as second:
            health = await second.get("/health")
            assert health.status_code == 503
            assert "in use by another vecmill server" in health.json()["message"]
            assert (await second.get("/jobs")).status_code == 503
            assert (await second.get("/metrics")).status_code == 200
        assert (await first.get(f"/jobs/{job_id}")).json()["status"] == "active"


async def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    async with serving(state_dir=str(file)) as client:
        job_id = (await client.post("/jobs", json=REGISTRATION)).json()["job_id"]
        assert (await client.post(f"/jobs/{job_id}/complete")).status_code == 200
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("cache_max_bytes", [0, 1_000_000], ids=["no cache", "a cache"])
async def test_redis_without_its_package_stops_the_start_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, cache_max_bytes: int
) -> None:
    for name in [name for name in sys.modules if name.startswith("vecmill.storage.redis")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.setitem(sys.modules, name, None)
    async with serving(redis_url="redis://127.0.0.1:1/0", cache_max_bytes=cache_max_bytes) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "pip install 'vecmill[redis]'" in health.json()["message"]
        assert (await client.get("/jobs")).status_code == 503
