"""The job queue on every store: order, places, leases, waits, and which call is possible when."""

from __future__ import annotations

import pytest

from tests.jobs.queues import SETTINGS, Hand, in_memory, later, opened
from vecmill.config import JobSettings
from vecmill.core.errors import InvalidInput, JobConflict, JobNotFound, JobsUnavailable, Overloaded
from vecmill.jobs import state
from vecmill.jobs.job import JobStatus
from vecmill.jobs.queue import JobQueue
from vecmill.jobs.state import OPEN_JOBS_MAX


async def test_first_come_first_served(jobs: JobQueue) -> None:
    first = await jobs.register("a", 10, "i")
    assert (first["status"], first["position"]) == ("active", 0)
    second = await jobs.register("b", 10, "i")
    assert (second["status"], second["position"]) == ("queued", 1)
    third = await jobs.register("c", 10, "i")
    assert third["position"] == 2
    await jobs.complete(first["id"])
    assert (await jobs.get(second["id"]))["status"] == "active"
    assert (await jobs.get(third["id"]))["position"] == 1
    await jobs.fail(second["id"], "gave up")
    assert (await jobs.get(third["id"]))["status"] == "active"


async def test_a_queued_job_can_be_cancelled_and_those_behind_move_up(jobs: JobQueue) -> None:
    await jobs.register("a", 10, "i")
    second, third = await jobs.register("b", 10, "i"), await jobs.register("c", 10, "i")
    seen = await jobs.cancel(second["id"])
    assert (seen["status"], seen["error"]) == ("failed", "cancelled")
    assert (await jobs.get(third["id"]))["position"] == 1


async def test_progress_pace_and_estimates(jobs: JobQueue, hand: Hand) -> None:
    job = await jobs.register("a", 100, "i")
    waiting = await jobs.register("b", 7, "i")
    assert (waiting["chunks_ahead"], waiting["estimated_wait"]) == (100, None)  # how fast the machine is nobody knows
    hand.now += 10
    seen = await jobs.progress(job["id"], 25)
    assert (seen["percent"], seen["chunks_per_second"], seen["eta_seconds"]) == (25.0, 2.5, 30.0)
    assert seen["elapsed_seconds"] == 10
    waiting = await jobs.get(waiting["id"])
    assert (waiting["chunks_ahead"], waiting["estimated_wait"]) == (75, 30.0)
    hand.now += 30
    seen = await jobs.complete(job["id"])
    assert (seen["status"], seen["current"], seen["duration_seconds"]) == ("completed", 100, 40)
    assert (await jobs.overview())["historical_rate"] == 2.5
    behind = await jobs.register("c", 7, "i")
    assert behind["estimated_wait"] == 2.8


async def test_eta_and_wait_follow_the_present_pace(jobs: JobQueue, hand: Hand) -> None:
    job = await jobs.register("a", 10_000, "i")
    done = 0
    for chunks in [10] * 60 + [1] * 240:  # a chunk each 0.1 s for a minute, then each second
        hand.now += 1
        done += chunks
        await jobs.progress(job["id"], done)
    seen = await jobs.get(job["id"])
    remaining = 10_000 - done
    assert seen["chunks_per_second"] == pytest.approx(1, rel=0.02)  # in the last minute
    assert seen["eta_seconds"] == pytest.approx(remaining, rel=0.05)
    assert (await jobs.overview())["historical_rate"] == pytest.approx(1, rel=0.2)
    waiting = await jobs.register("b", 1, "i")
    assert waiting["estimated_wait"] == pytest.approx(remaining, rel=0.2)


async def test_the_pace_of_the_machine_is_that_of_all_its_jobs(hand: Hand) -> None:
    settings = JobSettings(jobs_max_active=2)
    jobs = await opened(in_memory(hand, settings), settings)
    pair = [await jobs.register(name, 10_000, "i") for name in "ab"]
    for second in range(1, 200):
        hand.now += 1
        for job in pair:
            await jobs.progress(job["id"], 5 * second)
    assert (await jobs.overview())["historical_rate"] == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("current", [-1, 11, 10**12])
async def test_progress_outside_the_job_is_refused_and_changes_nothing(jobs: JobQueue, current: int) -> None:
    job = await jobs.register("a", 10, "i")
    await jobs.progress(job["id"], 4)
    with pytest.raises(InvalidInput, match="0 to 10"):
        await jobs.progress(job["id"], current)
    assert (await jobs.get(job["id"]))["current"] == 4


async def test_a_client_that_works_while_it_waits_is_let(jobs: JobQueue) -> None:
    await jobs.register("a", 10, "i")
    eager = await jobs.register("b", 10, "i")
    seen = await jobs.progress(eager["id"], 5)
    assert (seen["status"], seen["position"], seen["current"]) == ("queued", 1, 5)
    seen = await jobs.complete(eager["id"])
    assert (seen["status"], seen["current"]) == ("completed", 10)


async def test_an_ended_job_takes_no_more_calls(jobs: JobQueue) -> None:
    job = await jobs.register("a", 10, "i")
    await jobs.complete(job["id"])
    for call in (
        jobs.complete(job["id"]),
        jobs.fail(job["id"], "late"),
        jobs.cancel(job["id"]),
        jobs.progress(job["id"], 5),
    ):
        with pytest.raises(JobConflict, match="is completed already"):
            await call
    assert (await jobs.get(job["id"]))["status"] == "completed"


async def test_an_abandoned_job_fails_and_frees_its_place(jobs: JobQueue, hand: Hand) -> None:
    dead, waiting = await jobs.register("a", 10, "i"), await jobs.register("b", 10, "i")
    await later(jobs, hand, 100, waiting)
    assert (await jobs.get(dead["id"]))["status"] == "active"
    # That was a poll: its client lived until now.
    await later(jobs, hand, 101, waiting)
    listed = await jobs.overview()
    assert [job["id"] for job in listed["active"]] == [waiting["id"]]
    [seen] = listed["recent"]
    assert (seen["id"], seen["status"]) == (dead["id"], "failed")
    assert "no sign from its client for 100 seconds" in seen["error"]


@pytest.mark.parametrize("sign", ["progress", "poll", "embed"])
async def test_each_sign_of_life_renews_the_lease(jobs: JobQueue, hand: Hand, sign: str) -> None:
    job = await jobs.register("a", 10, "i")
    for _ in range(5):
        await later(jobs, hand, 90)
        match sign:
            case "progress":
                await jobs.progress(job["id"], 1)
            case "poll":
                await jobs.get(job["id"])
            case _:
                jobs.touch(job["id"])
                jobs.touch("unknown")
                await jobs.sweep()  # after it in the line of transactions
    assert (await jobs.overview())["active"][0]["id"] == job["id"]


async def test_several_places(hand: Hand) -> None:
    settings = JobSettings(jobs_max_active=2)
    jobs = await opened(in_memory(hand, settings), settings)
    assert [(await jobs.register(name, 1, "i"))["position"] for name in "abcd"] == [0, 0, 1, 2]
    assert (await jobs.overview())["workers"] == {"max": 2, "busy": 2}


async def test_who_has_waited_too_long_begins_beside_the_others_when_it_is_due(hand: Hand) -> None:
    settings = JobSettings(jobs_max_active=1)  # 270 s of waiting, a lease of 300 s
    jobs = await opened(in_memory(hand, settings), settings)
    running, first = await jobs.register("a", 10_000, "i"), await jobs.register("b", 10, "i")
    await later(jobs, hand, 100, running, first)
    second = await jobs.register("c", 10, "i")
    await later(jobs, hand, 169, running, first, second)
    assert (await jobs.get(first["id"]))["status"] == "queued"
    await later(jobs, hand, 1, running)
    assert [(await jobs.get(job["id"]))["status"] for job in (running, first, second)] == ["active", "active", "queued"]
    await later(jobs, hand, 99, running, first, second)
    assert (await jobs.get(second["id"]))["status"] == "queued"
    await jobs.complete(first["id"])
    assert (await jobs.get(second["id"]))["status"] == "queued"  # it had no place of its own to give
    await later(jobs, hand, 1, running)
    assert (await jobs.get(second["id"]))["status"] == "active"


async def test_the_estimated_wait_is_no_more_than_what_anybody_waits(hand: Hand) -> None:
    settings = JobSettings(jobs_max_active=1)
    jobs = await opened(in_memory(hand, settings), settings)
    running, waiting = await jobs.register("a", 1_000_000, "i"), await jobs.register("b", 10, "i")
    hand.now += 30
    await jobs.progress(running["id"], 30)
    assert (await jobs.get(waiting["id"]))["estimated_wait"] == 240.0


@pytest.mark.slow
async def test_the_history_is_bounded_and_can_be_cleared(jobs: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 40
    monkeypatch.setattr(state, "ENDED_KEPT", kept)
    first = last = ""
    for index in range(kept + 5):
        last = (await jobs.register(str(index), 1, "i"))["id"]
        first = first or last
        await jobs.complete(last)
    recent = (await jobs.overview())["recent"]
    assert (len(recent), recent[0]["id"]) == (10, last)
    assert len((await jobs.overview(limit=1000))["recent"]) == jobs.count(JobStatus.COMPLETED) == kept
    with pytest.raises(JobNotFound):
        await jobs.get(first)
    assert await jobs.clear_ended() == kept
    with pytest.raises(JobNotFound):
        await jobs.get(last)


async def test_filters(jobs: JobQueue) -> None:
    done = await jobs.register("a", 1, "i")
    await jobs.complete(done["id"])
    failed = await jobs.register("b", 1, "i")
    await jobs.cancel(failed["id"])
    for name in "abb":
        await jobs.register(name, 1, "i")

    async def shown(**filters: object) -> tuple[str, str, str]:
        listed = await jobs.overview(**filters)  # type: ignore[arg-type]
        active, queued, recent = (
            "".join(job["project"] for job in listed[name]) for name in ("active", "queued", "recent")
        )
        assert listed["workers"]["busy"] == 1
        return active, queued, recent

    assert await shown() == ("a", "bb", "ba")
    assert await shown(limit=1) == ("a", "bb", "b")
    assert await shown(project="b") == ("", "bb", "b")
    assert await shown(project="b", limit=1, state=JobStatus.QUEUED) == ("", "bb", "")
    assert await shown(state=JobStatus.ACTIVE) == ("a", "", "")
    assert await shown(state=JobStatus.COMPLETED) == ("", "", "a")
    assert await shown(state=JobStatus.FAILED) == ("", "", "b")


async def test_registering_without_end_is_refused(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    for index in range(OPEN_JOBS_MAX):
        await jobs.register(str(index), 1, "i")
    with pytest.raises(Overloaded, match="temporarily"):
        await jobs.register("one more", 1, "i")


async def test_before_it_is_open_it_says_so_and_counts_nothing() -> None:
    jobs = JobQueue(SETTINGS)
    with pytest.raises(JobsUnavailable, match="temporarily"):
        await jobs.overview()
    with pytest.raises(JobsUnavailable):
        jobs.follow(1)
    jobs.touch("x")
    assert jobs.count(JobStatus.ACTIVE) == 0
    await jobs.close()
