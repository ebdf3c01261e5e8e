"""Two servers on one Redis: one order, one set of places; and what happens when Redis goes away."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from time import monotonic

import pytest
import redis as redis_client

from tests.jobs.queues import SETTINGS, Hand, ids, later, on_redis, opened
from tests.redis_server import redis_server
from tests.servers import free_port
from vecmill.config import JobSettings
from vecmill.core.errors import JobsUnavailable, VecmillError
from vecmill.jobs.job import JobStatus
from vecmill.jobs.shared import SharedJobs
from vecmill.storage.redis import META, OPEN, RedisJobs


async def test_a_job_of_one_server_is_a_job_of_the_other(redis_url: str, hand: Hand) -> None:
    queue_a, queue_b = await opened(on_redis(redis_url, hand)), await opened(on_redis(redis_url, hand))
    first = await queue_a.register("a", 10, "i")
    second = await queue_b.register("b", 10, "i")
    assert (first["position"], second["position"]) == (0, 1)
    hand.now += 2
    await queue_b.progress(first["id"], 4)
    assert (await queue_a.get(first["id"]))["current"] == 4
    await queue_b.complete(first["id"])
    assert (await queue_a.get(second["id"]))["status"] == "active"
    assert await ids(queue_a) == await ids(queue_b) == {"active": [second["id"]], "queued": [], "recent": [first["id"]]}
    assert await queue_a.clear_ended() == 1
    assert (await ids(queue_b))["recent"] == []
    assert queue_b.count(JobStatus.ACTIVE) == 1
    await queue_a.close()
    await queue_b.close()


@pytest.mark.parametrize("seed", range(4))
async def test_never_more_active_than_there_are_places(redis_url: str, seed: int) -> None:
    """Three servers, each at its own pace; every answer is checked as it comes."""
    settings = JobSettings(jobs_max_active=2)
    queues = [await opened(SharedJobs(settings, RedisJobs(redis_url)), settings) for _ in range(3)]
    registered: list[str] = []

    async def client(number: int) -> None:
        choose = random.Random(100 * seed + number)
        for _ in range(15):
            queue = choose.choice(queues)
            job_id = (await queue.register("p", 10, "i"))["id"]
            registered.append(job_id)
            for _ in range(choose.randint(0, 2)):
                await choose.choice(queues).progress(job_id, choose.randint(0, 10))
            if choose.random() < 0.7:
                await choose.choice(queues).complete(job_id)
            listed = await choose.choice(queues).overview()
            assert len(listed["active"]) <= 2
            assert len(listed["active"]) == 2 or not listed["queued"]
            starts = [job["created_at"] for job in listed["queued"]]
            assert starts == sorted(starts)

    await asyncio.gather(*(client(number) for number in range(6)))
    seen = [await queue.overview(limit=1000) for queue in queues]
    for name in ("active", "queued", "recent"):
        assert len({tuple(job["id"] for job in listing[name]) for listing in seen}) == 1
    everything = [job["id"] for name in ("active", "queued", "recent") for job in seen[0][name]]
    assert sorted(everything) == sorted(registered)
    for queue in queues:
        await queue.close()


@pytest.mark.parametrize("kept", [True, False], ids=["with its data", "empty"])
async def test_redis_dies_and_comes_back(tmp_path: Path, hand: Hand, kept: bool) -> None:
    port = free_port()
    options = ("--appendonly", "yes", "--appendfsync", "always") if kept else ()
    with redis_server(tmp_path, *options, port=port) as url:
        jobs = await opened(on_redis(url, hand))
        running, waiting = await jobs.register("a", 10, "i"), await jobs.register("b", 10, "i")
        hand.now += 2
        await jobs.progress(running["id"], 4)
        before = await ids(jobs)
    with pytest.raises(JobsUnavailable, match="temporarily"):
        await jobs.get(running["id"])
    jobs.touch(running["id"])
    hand.now += 50
    jobs.touch(running["id"])
    await later(jobs, hand, 200)
    assert jobs.count(JobStatus.ACTIVE) == 1
    with redis_server(tmp_path, *options, port=port):
        await later(jobs, hand, 2)
        assert await ids(jobs) == before  # nobody could report: nobody is blamed
        assert (await jobs.get(running["id"]))["current"] == 4
        await later(jobs, hand, 101, waiting)
        assert (await ids(jobs))["active"] == [waiting["id"]]
        await jobs.close()


async def test_redis_that_is_not_there_at_the_start_is_found_later(tmp_path: Path, hand: Hand) -> None:
    port = free_port()
    jobs = await opened(on_redis(f"redis://127.0.0.1:{port}/0", hand))
    with pytest.raises(JobsUnavailable):
        await jobs.register("a", 10, "i")
    with redis_server(tmp_path, port=port):
        hand.now += 2
        assert (await jobs.register("a", 10, "i"))["position"] == 0
        await jobs.close()


async def test_redis_without_room_is_503_and_works_again(redis_url: str, hand: Hand) -> None:
    jobs = await opened(on_redis(redis_url, hand))
    job = await jobs.register("a", 10, "i")
    with redis_client.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(JobsUnavailable):
                await jobs.progress(job["id"], 4)
        finally:
            client.config_set("maxmemory", "0")
    hand.now += 2
    assert (await jobs.progress(job["id"], 4))["current"] == 4
    await jobs.close()


async def test_redis_that_hangs_holds_nobody_up(tmp_path: Path, hand: Hand) -> None:
    with redis_server(tmp_path) as url:
        jobs = await opened(on_redis(url, hand))
        job = await jobs.register("a", 10, "i")
        with redis_client.Redis.from_url(url) as client:
            pid = int(client.info("server")["process_id"])
        os.kill(pid, signal.SIGSTOP)
        try:
            began = monotonic()
            answers = await asyncio.gather(*(jobs.get(job["id"]) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(answer, JobsUnavailable) for answer in answers)
            assert monotonic() - began < 5  # not 20 times the patience with Redis
        finally:
            os.kill(pid, signal.SIGCONT)
        hand.now += 2
        assert (await jobs.get(job["id"]))["status"] == "active"
        await jobs.close()


@pytest.mark.parametrize("jump", [-7200, 7200])
async def test_setting_the_clock_of_redis_ends_no_job_and_stalls_none(redis_url: str, jump: float) -> None:
    hand, server_time = Hand(), Hand(5_000_000.0)
    jobs = await opened(on_redis(redis_url, hand, SETTINGS, server_time))

    async def pass_by(seconds: int, *alive: str) -> None:
        for _ in range(seconds):
            hand.now += 1
            server_time.now += 1
            await jobs.sweep()
            for job_id in alive:
                await jobs.get(job_id)

    silent, alive = (await jobs.register("a", 10, "i"))["id"], (await jobs.register("b", 10, "i"))["id"]
    await pass_by(30, alive)
    server_time.now += jump
    await pass_by(60, alive)
    assert (await ids(jobs))["active"] == [silent]
    await pass_by(30, alive)
    assert (await ids(jobs))["active"] == [alive]
    [ended] = (await jobs.overview())["recent"]
    assert ended["duration_seconds"] == pytest.approx(100, abs=5)
    await jobs.close()


async def test_nonsense_in_redis_harms_only_itself(redis_url: str, hand: Hand) -> None:
    jobs = await opened(on_redis(redis_url, hand))
    job, lost = await jobs.register("a", 10, "i"), await jobs.register("b", 10, "i")
    with redis_client.Redis.from_url(redis_url) as client:
        client.hset(OPEN, lost["id"], "nonsense")
        with pytest.raises(VecmillError):
            await jobs.get(lost["id"])
        assert (await jobs.get(job["id"]))["status"] == "active"
        client.set(META, "nonsense")
        assert (await jobs.get(job["id"]))["status"] == "active"
    await jobs.close()


async def test_a_server_that_starts_again_and_again_keeps_no_silent_job_alive(redis_url: str, hand: Hand) -> None:
    jobs = await opened(on_redis(redis_url, hand))
    await jobs.register("a", 10, "i")
    for _ in range(11):
        await later(jobs, hand, 10)
        await (await opened(on_redis(redis_url, hand))).close()
    assert (await ids(jobs))["active"] == []
    await jobs.close()


async def test_calls_that_come_together_are_written_together(redis_url: str) -> None:
    jobs = await opened(SharedJobs(SETTINGS, RedisJobs(redis_url)))
    with redis_client.Redis.from_url(redis_url) as client:
        client.config_resetstat()
        views = await asyncio.gather(*(jobs.register("p", 10, f"{number}") for number in range(50)))
        commits = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert commits < 10
    assert [view["position"] for view in views] == list(range(50))
    with pytest.raises(VecmillError, match="no job"):
        await asyncio.gather(jobs.get("nobody"), jobs.get(views[0]["id"]))
    await jobs.close()
