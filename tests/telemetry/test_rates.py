"""Texts per second, by a clock that is moved by hand."""

from __future__ import annotations

import pytest

from tests.jobs.queues import SETTINGS, Hand, in_memory
from vecmill.jobs.queue import JobQueue
from vecmill.jobs.views import JobQuery
from vecmill.telemetry.rates import MOST_USERS, CountsById, Rates, UserId, Work


@pytest.fixture
def hand() -> Hand:
    """The clock of all rates."""
    return Hand()


def test_a_rate_is_of_the_last_minute(hand: Hand) -> None:
    rates = Rates(hand)
    for _ in range(120):
        hand.now += 1
        rates.answered(Work(texts=10, tokens=100, requests=1), UserId())
    assert rates.per_second(rates.minute.texts) == pytest.approx(10, rel=0.02)
    hand.now += 30
    assert rates.per_second(rates.minute.texts) == pytest.approx(5, rel=0.05)
    hand.now += 31
    assert (rates.per_second(rates.minute.texts), rates.minute) == (0, Work())


def test_it_is_right_from_the_first_seconds_of_work(hand: Hand) -> None:
    rates = Rates(hand)
    hand.now += 1000
    for _ in range(3):
        hand.now += 2
        rates.answered(Work(texts=64, requests=1), UserId(), took=2)
    assert rates.per_second(rates.minute.texts) == pytest.approx(32)


def test_a_request_that_took_longer_than_a_minute_counts_over_a_minute(hand: Hand) -> None:
    rates = Rates(hand)
    hand.now += 600
    rates.answered(Work(texts=6000, requests=1), UserId(), took=300)
    assert rates.per_second(rates.minute.texts) == pytest.approx(100, rel=0.02)


def test_users_and_jobs_sum_up_to_all(hand: Hand) -> None:
    rates = Rates(hand)
    users = [UserId(f"name:{key}", "10.0.0.1", job) for key in "ab" for job in (None, "j")]
    for _ in range(100):
        hand.now += 0.4
        for number, user in enumerate(users, 1):
            rates.answered(Work(texts=number, tokens=10 * number, requests=1), user, took=0.3)
    assert [user.id for user in rates.users()] == users[::-1]  # the most tokens first
    assert sum(user.minute.sums().texts for user in rates.users()) == rates.minute.texts == 1000
    assert rates.texts_of_job("j") == 600
    hand.now += 200
    assert [user.minute.sums().texts for user in rates.users()] == [0, 0, 0, 0]
    assert [user.lately.sums().requests for user in rates.users()] == [100] * 4  # seen in the last five minutes
    hand.now += 101
    assert rates.users() == []


def test_clients_that_come_without_end_take_no_more_memory(hand: Hand) -> None:
    rates = Rates(hand)
    for number in range(3 * MOST_USERS):
        hand.now += 0.01
        rates.answered(Work(1, 1, 1), UserId(None, f"10.0.{number // 256}.{number % 256}", f"job {number}"))
    assert len(rates.users()) == MOST_USERS
    assert rates.minute.requests == 3 * MOST_USERS
    assert rates.texts_of_job("job 0") == 1


def test_counts_that_have_become_zero_take_no_memory(hand: Hand) -> None:
    counts = CountsById(clock=hand)
    for number in range(1000):
        hand.now += 1
        counts.add(f"job {number}", 3)
        assert len(counts) <= 61
    assert [counts.count(f"job {number}") for number in (900, 945, 999)] == [0, 3, 3]


@pytest.mark.parametrize("invented", ["client", "job"])
def test_who_invents_names_makes_nobody_else_forgotten(hand: Hand, invented: str) -> None:
    rates = Rates(hand)
    others = [UserId("name:ben", "10.0.0.2", "j"), UserId("name:cat", "10.0.0.1"), UserId("name:ann", "10.0.0.3")]
    for user in others if invented == "job" else others[:2]:
        rates.answered(Work(7, 70, 1), user)
    for number in range(5 * MOST_USERS):
        client, job = (f"10.1.0.{number}", "j") if invented == "client" else ("10.0.0.9", f"job {number}")
        rates.answered(Work(1, 1, 1), UserId("name:ann", client, job))
    shown = [user.id for user in rates.users()]
    assert len(shown) == MOST_USERS
    assert set(others if invented == "job" else others[:2]) <= set(shown)


async def test_a_jobs_rate_is_what_was_answered_for_it_or_what_it_reported(hand: Hand) -> None:
    rates = Rates(hand)
    jobs = JobQueue(SETTINGS, rates)
    await jobs.open(in_memory(hand))
    job_id = (await jobs.register("p", 1000, "i"))["id"]

    def shown() -> tuple[float, float]:
        found, views = jobs.page(JobQuery())
        item = views.detailed(found.jobs[0])
        return item["texts_per_second"], item["chunks_per_second"]

    for done in range(32, 161, 32):
        hand.now += 1
        rates.answered(Work(texts=32, requests=1), UserId(job=job_id), took=1)
        await jobs.progress(job_id, done)
    everything = rates.per_second(rates.minute.texts)
    assert list(shown()) == [pytest.approx(everything)] * 2
    assert everything == pytest.approx(32)
    # Answered by another server, or without the job's id: only the reports tell.
    hand.now += 5
    await jobs.progress(job_id, 960)
    assert shown()[0] == pytest.approx(96)
    job = await jobs.get(job_id)
    assert job["chunks_per_second"] == pytest.approx(96)
    assert job["eta_seconds"] == pytest.approx((job["total_chunks"] - 960) / 96, abs=0.06)  # whoever divides finds it


async def test_silence_and_the_end_of_patience(hand: Hand) -> None:
    jobs = JobQueue(SETTINGS)
    await jobs.open(in_memory(hand))
    active, queued = [(await jobs.register(name, 10, "i"))["id"] for name in ("a", "")]
    hand.now += 51
    found, views = jobs.page(JobQuery())
    [first, second] = [views.detailed(job) for job in found.jobs]
    assert (first["id"], first["silent_seconds"], first["given_up_in_seconds"]) == (active, 51, 49)
    assert (first["waiting_seconds"], first["eta_seconds"], second["started_at"]) == (0, None, None)
    assert (second["id"], second["project"], second["waiting_seconds"]) == (queued, "", 51)
    await jobs.complete(active)
    found, views = jobs.page(JobQuery())
    ended = views.detailed(found.jobs[-1])
    assert (ended["texts_per_second"], ended["silent_seconds"], ended["given_up_in_seconds"]) == (None, None, None)
