"""The job queue: order, places, leases, and which call is possible when."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vecmill.config import JobSettings
from vecmill.core.errors import InvalidInput, JobConflict, JobNotFound, Overloaded
from vecmill.jobs.job import JobStatus
from vecmill.jobs.queue import ENDED_KEPT, OPEN_JOBS_MAX, JobQueue


@dataclass
class Clock:
    """Both clocks of the queue, moved by hand."""

    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(clock: Clock) -> JobQueue:
    return JobQueue(JobSettings(jobs_max_active=1, job_lease_seconds=100), clock, clock)


def test_first_come_first_served(jobs: JobQueue) -> None:
    first, position = jobs.register("a", 10, "i")
    assert (first.status, position) == (JobStatus.ACTIVE, 0)
    second, position = jobs.register("b", 10, "i")
    assert (second.status, position) == (JobStatus.QUEUED, 1)
    third, position = jobs.register("c", 10, "i")
    assert position == 2
    jobs.complete(first.id)
    assert (second.status, jobs.position(third)) == (JobStatus.ACTIVE, 1)
    jobs.fail(second.id, "cancelled")
    assert third.status is JobStatus.ACTIVE


def test_a_queued_job_can_be_cancelled_and_those_behind_move_up(jobs: JobQueue) -> None:
    jobs.register("a", 10, "i")
    second, _ = jobs.register("b", 10, "i")
    third, _ = jobs.register("c", 10, "i")
    jobs.fail(second.id, "cancelled")
    assert (second.status, second.error, jobs.position(third)) == (JobStatus.FAILED, "cancelled", 1)


def test_progress_pace_and_estimate(jobs: JobQueue, clock: Clock) -> None:
    job, _ = jobs.register("a", 100, "i")
    clock.now += 10
    jobs.progress(job.id, 25)
    view = jobs.view(job)
    assert (view["percent"], view["chunks_per_second"], view["eta_seconds"]) == (25.0, 2.5, 30.0)
    assert view["elapsed_seconds"] == 10
    waiting, _ = jobs.register("b", 7, "i")
    assert jobs.view(waiting)["chunks_ahead"] == 75
    assert jobs.view(waiting)["estimated_wait"] is None  # no job has shown yet how fast the machine is
    clock.now += 30
    jobs.complete(job.id)
    view = jobs.view(job)
    assert (view["status"], view["current"], view["duration_seconds"]) == ("completed", 100, 40)
    behind, _ = jobs.register("c", 7, "i")
    assert jobs.view(behind)["estimated_wait"] == pytest.approx(7 / 2.5)


@pytest.mark.parametrize("current", [-1, 11, 10**12])
def test_progress_outside_the_job_is_refused_and_changes_nothing(jobs: JobQueue, current: int) -> None:
    job, _ = jobs.register("a", 10, "i")
    jobs.progress(job.id, 4)
    with pytest.raises(InvalidInput, match="0 to 10"):
        jobs.progress(job.id, current)
    assert job.current == 4


def test_an_ended_job_takes_no_more_calls(jobs: JobQueue) -> None:
    job, _ = jobs.register("a", 10, "i")
    jobs.complete(job.id)
    with pytest.raises(JobConflict, match="completed already"):
        jobs.complete(job.id)
    with pytest.raises(JobConflict, match="completed already"):
        jobs.fail(job.id, "late")
    with pytest.raises(JobConflict, match="completed already"):
        jobs.progress(job.id, 5)
    assert jobs.get(job.id).status is JobStatus.COMPLETED


def test_an_abandoned_job_fails_and_frees_its_place(jobs: JobQueue, clock: Clock) -> None:
    dead, _ = jobs.register("a", 10, "i")
    waiting, _ = jobs.register("b", 10, "i")
    clock.now += 99
    jobs.get(waiting.id)  # its client polls, the other's is gone
    clock.now += 2
    assert jobs.get(waiting.id).status is JobStatus.ACTIVE
    assert jobs.get(dead.id).status is JobStatus.FAILED
    assert "no sign from its client for 100 seconds" in str(dead.error)


@pytest.mark.parametrize("sign", ["progress", "poll", "embed"])
def test_each_sign_of_life_renews_the_lease(jobs: JobQueue, clock: Clock, sign: str) -> None:
    job, _ = jobs.register("a", 10, "i")
    for _ in range(5):
        clock.now += 90
        match sign:
            case "progress":
                jobs.progress(job.id, 1)
            case "poll":
                jobs.get(job.id)
            case _:
                jobs.touch(job.id)
    assert jobs.get(job.id).status is JobStatus.ACTIVE


def test_several_places() -> None:
    jobs = JobQueue(JobSettings(jobs_max_active=2))
    positions = [jobs.register(name, 1, "i")[1] for name in "abcd"]
    assert positions == [0, 0, 1, 2]
    assert jobs.overview()["workers"] == {"max": 2, "busy": 2}


def test_the_history_is_bounded_and_can_be_cleared(jobs: JobQueue) -> None:
    last = ""
    for index in range(ENDED_KEPT + 5):
        job, _ = jobs.register(str(index), 1, "i")
        jobs.complete(job.id)
        last = job.id
    recent = jobs.overview()["recent"]
    assert isinstance(recent, list)
    assert (len(recent), recent[0]["id"]) == (10, last)
    assert jobs.clear_ended() == ENDED_KEPT
    with pytest.raises(JobNotFound):
        jobs.get(last)


def test_registering_without_end_is_refused(jobs: JobQueue) -> None:
    for index in range(OPEN_JOBS_MAX):
        jobs.register(str(index), 1, "i")
    with pytest.raises(Overloaded, match="temporarily"):
        jobs.register("one more", 1, "i")
