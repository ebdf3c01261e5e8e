"""Many who follow many jobs: each hears of every change, and nobody else waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import orjson
import pytest

from tests.hostile.stalls import LONGEST_STALL, longest_stall
from tests.jobs.queues import Hand, in_memory, opened
from vecmill.core.errors import Overloaded
from vecmill.jobs.queue import JobQueue
from vecmill.jobs.state import OPEN_JOBS_MAX
from vecmill.jobs.views import FOLLOWERS_MAX, READERS_AT_ONCE

FOLLOWERS = 300
LONG = 600.0  # seconds; no test waits for it


@pytest.fixture
def hand() -> Hand:
    return Hand()


async def read(changes: AsyncGenerator[list[bytes], None], count: int) -> list[bytes]:
    """So many jobs, or more."""
    seen: list[bytes] = []
    while len(seen) < count:
        seen += await anext(changes)
    return seen


async def full(hand: Hand) -> tuple[JobQueue, list[str]]:
    """As many open jobs as there may be: one active, the others in a queue."""
    jobs = await opened(in_memory(hand))
    return jobs, [(await jobs.register(f"project {index}", 10, "i"))["id"] for index in range(OPEN_JOBS_MAX)]


async def test_a_change_of_all_jobs_reaches_all_who_follow(hand: Hand) -> None:
    jobs, ids = await full(hand)
    followers = [jobs.follow(LONG) for _ in range(FOLLOWERS)]
    async with longest_stall() as stall:
        first = await asyncio.gather(*(read(changes, OPEN_JOBS_MAX) for changes in followers))
    assert all([orjson.loads(job)["id"] for job in seen] == ids for seen in first[::100])
    assert stall.seconds < LONGEST_STALL
    async with longest_stall() as stall:
        reading = [asyncio.create_task(read(changes, OPEN_JOBS_MAX)) for changes in followers]
        await jobs.complete(ids[0])  # each of the others moves up
        seen = await asyncio.gather(*reading)
    assert stall.seconds < LONGEST_STALL
    for news in seen[::100]:
        states = [(job["status"], job["position"]) for job in map(orjson.loads, news)]
        assert states == [("completed", 0), ("active", 0), *(("queued", place) for place in range(1, len(ids) - 1))]
    for changes in followers:
        await changes.aclose()


async def test_what_nobody_changed_wakes_nobody(hand: Hand) -> None:
    jobs, ids = await full(hand)
    changes = jobs.follow(0.3)
    await read(changes, OPEN_JOBS_MAX)
    for _ in range(20):
        await jobs.sweep()
        await jobs.get(ids[0])
    assert await anext(changes) == []
    await changes.aclose()


async def test_all_who_follow_get_the_same_bytes(hand: Hand) -> None:
    """A job is put into JSON once, whoever reads it."""
    jobs = await opened(in_memory(hand))
    await jobs.register("a", 10, "i")
    followers = [jobs.follow(LONG) for _ in range(2 * READERS_AT_ONCE)]
    seen = [(await anext(changes))[0] for changes in followers]
    assert all(payload is seen[0] for payload in seen)
    for changes in followers:
        await changes.aclose()


async def test_times_are_those_of_now_for_whoever_comes_later(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    await jobs.register("a", 10, "i")
    for seconds in (0, 7, 90):
        hand.now += seconds
        changes = jobs.follow(LONG)
        [seen] = await anext(changes)
        [listed] = (await jobs.overview())["active"]
        assert orjson.loads(seen) == listed
        await changes.aclose()


async def test_one_too_many_is_told_to_come_again(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    await jobs.register("a", 10, "i")
    followers = [jobs.follow(LONG) for _ in range(FOLLOWERS_MAX)]
    for changes in followers:
        await anext(changes)
    with pytest.raises(Overloaded, match=f"{FOLLOWERS_MAX} clients follow"):
        jobs.follow(LONG)
    await followers[0].aclose()
    await anext(jobs.follow(LONG))
    jobs.end_following()
    for changes in followers[1:]:
        with pytest.raises(StopAsyncIteration):
            await anext(changes)


async def test_all_at_once_are_no_more_than_one_after_another(hand: Hand) -> None:
    """Who is one too many is at its end at once, and comes again as the stream has told it to."""
    jobs = await opened(in_memory(hand))
    await jobs.register("a", 10, "i")
    followers = [jobs.follow(LONG) for _ in range(FOLLOWERS_MAX + 90)]
    seen = await asyncio.gather(*(anext(changes, None) for changes in followers))
    assert len([news for news in seen if news]) == FOLLOWERS_MAX
    for changes in followers:
        await changes.aclose()
