"""What outlives the process, however it ends."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.queues import SETTINGS, Hand, ids, in_memory, later, on_redis, on_sqlite, opened
from vecmill.config import JobSettings
from vecmill.core.clock import Clock
from vecmill.jobs.local import LocalJobs
from vecmill.jobs.queue import JobQueue
from vecmill.storage.sqlite_jobs import SqliteJobs

LASTING = ("id", "project", "total_chunks", "instance_id", "current", "status", "created_at", "started_at", "error")


async def test_ids_order_progress_and_timing_are_there_again(tmp_path: Path, hand: Hand) -> None:
    jobs = await opened(on_sqlite(tmp_path, hand))
    done = await jobs.register("done", 8, "i")
    hand.now += 2
    await jobs.complete(done["id"])
    gone = await jobs.register("gone", 8, "i")
    await jobs.fail(gone["id"], "disk full")
    running, first, second = [await jobs.register(name, 100, "i") for name in "abc"]
    hand.now += 10
    await jobs.progress(running["id"], 40)
    before, listed = await ids(jobs), await jobs.overview()
    await jobs.close()

    hand.now += 20  # the server is away
    again = await opened(on_sqlite(tmp_path, hand))
    assert await ids(again) == before
    seen = await again.get(running["id"])
    assert (seen["status"], seen["current"], seen["elapsed_seconds"], seen["eta_seconds"]) == ("active", 40, 30, 15.0)
    assert [(await again.get(job["id"]))["position"] for job in (first, second)] == [1, 2]
    now = await again.overview()
    assert now["recent"] == listed["recent"]
    assert now["historical_rate"] == listed["historical_rate"] == 4.0
    await again.complete(running["id"])
    assert (await again.get(first["id"]))["status"] == "active"
    await again.close()


@pytest.mark.parametrize("kept_by", ["sqlite", "redis"])
async def test_leases_begin_anew_with_the_server_and_waits_go_on(tmp_path: Path, redis_url: str, kept_by: str) -> None:
    settings = JobSettings(jobs_max_active=1, job_lease_seconds=100)
    hand = Hand()

    def store() -> Any:
        return on_sqlite(tmp_path, hand, settings) if kept_by == "sqlite" else on_redis(redis_url, hand, settings)

    jobs = await opened(store(), settings)
    running, waiting = await jobs.register("a", 10, "i"), await jobs.register("b", 10, "i")
    await later(jobs, hand, 60)
    await jobs.close()
    hand.now += 200
    jobs = await opened(store(), settings)
    await later(jobs, hand, 9)
    assert (await ids(jobs))["queued"] == [waiting["id"]]
    await later(jobs, hand, 1)
    assert (await ids(jobs))["active"] == [running["id"], waiting["id"]]  # 270 s since it was registered
    await later(jobs, hand, 90)
    assert len((await ids(jobs))["active"]) == 2
    await later(jobs, hand, 1)
    assert (await ids(jobs))["active"] == []
    await jobs.close()


async def test_a_clock_that_was_set_back_between_two_runs_harms_nothing(tmp_path: Path, hand: Hand) -> None:
    wall = Hand(1_000_000.0)
    jobs = await opened(on_sqlite(tmp_path, hand, wall=wall))
    job, waiting = await jobs.register("a", 10, "i"), await jobs.register("b", 10, "i")
    hand.now += 50
    await jobs.progress(job["id"], 5)
    await jobs.close()
    wall.now -= 500_000
    jobs = await opened(on_sqlite(tmp_path, hand, wall=wall))
    seen = await jobs.get(job["id"])
    assert (seen["elapsed_seconds"], seen["created_at"], seen["eta_seconds"]) == (50, 1_000_000.0, 50.0)
    await later(jobs, hand, 101, waiting)
    assert (await jobs.overview())["recent"][0]["duration_seconds"] == 151
    assert (await jobs.get(waiting["id"]))["status"] == "active"
    await jobs.close()


async def test_setting_the_clock_during_the_run_changes_nothing(hand: Hand) -> None:
    wall = Hand(1_000_000.0)
    jobs = await opened(LocalJobs(SETTINGS, None, Clock(wall, hand)))
    job = await jobs.register("a", 10, "i")
    for step in (-900_000, 5_000_000):
        wall.now += step
        await later(jobs, hand, 50)
        assert (await jobs.get(job["id"]))["status"] == "active"
    assert (await jobs.get(job["id"]))["elapsed_seconds"] == 100


async def test_without_a_place_to_keep_them_jobs_are_in_memory(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    job = await jobs.register("a", 10, "i")
    assert (await jobs.get(job["id"]))["status"] == "active"
    await jobs.close()


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, 12))])
async def test_what_a_client_was_told_survives_sigkill(tmp_path: Path, seed: int) -> None:
    acknowledged = killed_after(random.Random(seed).randint(1, 150), tmp_path, seed)
    settings = JobSettings(jobs_max_active=2)
    jobs = await opened(LocalJobs(settings, SqliteJobs(tmp_path / "jobs.db")), settings)
    await _compare(jobs, acknowledged)
    await jobs.close()


def killed_after(answers: int, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The last answer about each job from a process that was killed at work."""
    lines: list[bytes] = []
    command = [sys.executable, "-m", "tests.jobs.killed", str(folder), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines += [process.stdout.readline() for _ in range(answers)]
        process.kill()
        # It worked on until it was dead: the answers that it had written by then count too.
        lines += process.stdout.read().splitlines(keepends=True)
    seen = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {job["id"]: job for job in seen}


async def _compare(jobs: JobQueue, acknowledged: dict[str, dict[str, Any]]) -> None:
    """The restored jobs are those that were acknowledged, but for one call that was stored and not answered."""
    listed = await jobs.overview(limit=1000)
    restored = {job["id"]: job for name in ("active", "queued", "recent") for job in listed[name]}
    assert set(acknowledged) <= set(restored)
    assert len(restored) <= len(acknowledged) + 1
    assert sum(not _agree(job, restored[job_id]) for job_id, job in acknowledged.items()) <= 1
    order = [job["id"] for job in (*listed["active"], *listed["queued"])]
    assert [job_id for job_id in order if job_id in acknowledged] == [
        job_id for job_id in acknowledged if job_id in order
    ]
    assert len(listed["active"]) == min(2, len(order))


def _agree(acknowledged: dict[str, Any], restored: dict[str, Any]) -> bool:
    """Whether both are equal, but for a queued job that has become active since."""
    activated = acknowledged["status"] == "queued" and restored["status"] == "active"
    names = [name for name in LASTING if not (activated and name in ("status", "started_at"))]
    return [acknowledged.get(name) for name in names] == [restored.get(name) for name in names]
