"""Jobs of many clients at four servers that share a Redis and are killed at random."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.faults.replicas import ABANDONED, Crowd, Seen, assert_first_come_first_served, kill_at_random, replicas
from tests.redis_server import redis_server

SERVERS = 4


@pytest.mark.parametrize(
    ("seed", "clients", "places", "silent", "pause", "lease"),
    [
        pytest.param(1, 24, 2, 1, 0.5, 6.0, id="quick"),
        *(
            pytest.param(
                seed,
                200,
                places,
                2,
                2.0,
                60.0,
                id=f"seed {seed}",
                marks=[pytest.mark.nightly, pytest.mark.timeout(1200)],
            )
            for seed, places in ((11, 1), (12, 2), (13, 4))
        ),
    ],
)
async def test_order_and_leases_hold_while_servers_are_killed(
    tiny_model: Path, tmp_path: Path, seed: int, clients: int, places: int, silent: int, pause: float, lease: float
) -> None:
    """No job is lost or overtaken, no more are active than there are places, every answer is right or a 503."""
    redis = tmp_path / "redis"
    redis.mkdir()
    seen, stop = Seen(places), asyncio.Event()
    with redis_server(redis) as url:
        settings = {"REDIS_URL": url, "JOBS_MAX_ACTIVE": str(places), "JOB_LEASE_SECONDS": str(lease)}
        with replicas(SERVERS, tiny_model, tmp_path, **settings, JOBS_MAX_WAIT_SECONDS="100000") as servers:
            async with Crowd(servers, seen, seed, clients) as crowd:
                killing = asyncio.create_task(kill_at_random(servers, seed, pause, stop))
                try:
                    async with asyncio.TaskGroup() as tasks:
                        for number in range(clients):
                            tasks.create_task(crowd.index(number, silent=number < silent))
                finally:
                    stop.set()
                    kills = await killing
                jobs = await all_ended(crowd, lease)
    assert kills
    ids = [job["id"] for job in jobs]
    assert len(set(ids)) == len(ids)
    assert set(seen.registered) <= set(ids)
    assert len({job["instance_id"] for job in jobs} - seen.instances) == 0
    by_id = {job["id"]: job for job in jobs}
    assert {job for job in seen.registered if by_id[job]["status"] == "completed"} == seen.completed
    assert len(seen.completed) == clients - silent
    lost = [job for job in jobs if job["id"] not in seen.completed]
    assert {job["id"] for job in lost} >= seen.silent
    assert all(job["error"].startswith(ABANDONED) for job in lost)
    assert_first_come_first_served(jobs, places)


async def all_ended(crowd: Crowd, lease: float) -> list[dict[str, Any]]:
    """All jobs, once none is open: those whose clients are gone lose their leases one after the other."""
    async with asyncio.timeout(60 + 20 * lease):
        while True:
            listed = await crowd._call("GET", "/jobs?limit=1000")
            if not listed["active"] and not listed["queued"]:
                return list(listed["recent"])
            await asyncio.sleep(0.2)
