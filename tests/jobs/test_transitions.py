"""The table of states against every call, and the queue's invariants under any sequence of calls."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from tests.jobs.queues import Hand, in_memory
from vecmill.config import JobSettings
from vecmill.core.errors import JobConflict
from vecmill.jobs.job import Job, JobEvent, JobStatus, View, after
from vecmill.jobs.queue import JobQueue

T = TypeVar("T")

MAX_ACTIVE, MAX_WAIT, LEASE = 2, 50, 80


# What clients may rely on, in the words of the wire; everything else is a conflict.
ALLOWED = {
    ("queued", "activate"): "active",
    ("queued", "progress"): "queued",
    ("queued", "complete"): "completed",
    ("queued", "fail"): "failed",
    ("queued", "cancel"): "failed",
    ("queued", "abandon"): "failed",
    ("active", "progress"): "active",
    ("active", "complete"): "completed",
    ("active", "fail"): "failed",
    ("active", "cancel"): "failed",
    ("active", "abandon"): "failed",
}


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("event", JobEvent)
def test_each_state_leads_where_it_may_and_all_else_is_a_conflict(status: JobStatus, event: JobEvent) -> None:
    if (status, event) in ALLOWED:
        assert after("x", status, event).value == ALLOWED[status, event]
    else:
        with pytest.raises(JobConflict, match=f"Job x is {status.value}.*`{event.value}`"):
            after("x", status, event)


def test_only_a_job_that_has_not_ended_can_change() -> None:
    assert {status.value for status in JobStatus if not status.ended} == {status for status, _ in ALLOWED}


class Clients(RuleBasedStateMachine):
    """Clients that make any sequence of calls to one server's queue."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.hand = Hand()
        settings = JobSettings(jobs_max_active=MAX_ACTIVE, jobs_max_wait_seconds=MAX_WAIT, job_lease_seconds=LEASE)
        self.store = in_memory(self.hand, settings)
        self.queue = JobQueue(settings)
        self.call(self.queue.open(self.store))
        self.before: dict[str, Job] = {}
        self.registered: list[str] = []

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    @rule(target=jobs, total=st.integers(0, 5))
    def register(self, total: int) -> str:
        job_id: str = self.call(self.queue.register("p", total, "i"))["id"]
        self.registered.append(job_id)
        return job_id

    @rule(job_id=jobs)
    def poll(self, job_id: str) -> None:
        self.call(self.queue.get(job_id))

    @rule(job_id=jobs, event=st.sampled_from([JobEvent.PROGRESS, JobEvent.COMPLETE, JobEvent.FAIL, JobEvent.CANCEL]))
    def change(self, job_id: str, event: JobEvent) -> None:
        self.call(self.queue.sweep())
        status = JobStatus(self.stored_job(job_id).status)
        calls = {
            JobEvent.PROGRESS: self.queue.progress(job_id, 0),
            JobEvent.COMPLETE: self.queue.complete(job_id),
            JobEvent.FAIL: self.queue.fail(job_id, "why"),
            JobEvent.CANCEL: self.queue.cancel(job_id),
        }
        call = calls.pop(event)
        for other in calls.values():
            other.close()
        if (status, event) in ALLOWED:
            assert self.call(call)["status"] == ALLOWED[status, event]
        else:
            with pytest.raises(JobConflict, match=status.value):
                self.call(call)

    @rule(job_id=consumes(jobs))
    def leave(self, job_id: str) -> None:
        """The job's client makes no more calls."""

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.hand.now += 1
            self.call(self.queue.sweep())

    def stored_job(self, job_id: str) -> Job:
        ledger = self.store.ledger
        return ledger.open.get(job_id) or ledger.ended[job_id]

    @invariant()
    def places(self) -> None:
        """No more active jobs than places, except jobs that waited too long; no free place while a job waits."""
        jobs = self.store.ledger.open.values()
        active = [job for job in jobs if job.status is JobStatus.ACTIVE]
        in_time = [job for job in active if (job.started_at or 0) - job.created_at < MAX_WAIT]
        queued = [job for job in jobs if job.status is JobStatus.QUEUED]
        assert len(in_time) <= MAX_ACTIVE
        assert not queued or len(active) >= MAX_ACTIVE
        assert all(self.hand.now - job.created_at < MAX_WAIT for job in queued)

    @invariant()
    def order(self) -> None:
        """First come, first served: queued jobs came after all active ones, and positions are in that order."""
        jobs = list(self.store.ledger.open.values())
        assert [job.id for job in jobs] == [job_id for job_id in self.registered if job_id in self.store.ledger.open]
        states = [job.status for job in jobs]
        assert states == sorted(states)  # `active` is before `queued`
        listed: View = self.call(self.queue.overview(limit=1000))
        assert [job["position"] for job in listed["queued"]] == list(range(1, len(listed["queued"]) + 1))
        assert all(job["elapsed_seconds"] >= 0 for job in listed["active"])

    @invariant()
    def leases_and_versions(self) -> None:
        """Every open job can expire; a job that differs has a higher version; an ended one never changes."""
        ledger = self.store.ledger
        assert all(self.hand.now <= job.lease_until <= self.hand.now + LEASE for job in ledger.open.values())
        now = {**ledger.ended, **ledger.open}
        for job_id, job in self.before.items():
            later = now[job_id]
            same = (job.status, job.current, job.error) == (later.status, later.current, later.error)
            assert later.version > job.version or (same and later.version == job.version)
            assert not job.status.ended or later is job
        self.before = now

    def teardown(self) -> None:
        self.call(self.queue.close())
        self.runner.close()


@pytest.mark.slow
def test_any_clients_at_all() -> None:
    check_clients(lives=15)


@pytest.mark.nightly
def test_many_clients_at_all() -> None:
    check_clients(lives=200)


def check_clients(lives: int) -> None:
    settings = hypothesis_settings(max_examples=lives, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(Clients, settings=settings)
