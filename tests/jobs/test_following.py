"""What a reader of the changes gets, however slow it is and wherever the change was made."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson
import pytest

from tests.jobs.queues import Hand, in_memory, on_redis, opened
from vecmill.jobs.job import View
from vecmill.jobs.queue import JobQueue

LONG = 60.0  # seconds; no test waits for it


async def news(changes: AsyncGenerator[list[bytes], None]) -> list[tuple[str, str, int]]:
    """Project, state and position of the next ones."""
    return [(job["project"], job["status"], job["position"]) for job in map(orjson.loads, await anext(changes))]


async def test_each_change_comes_once_and_a_lease_is_none(jobs: JobQueue, hand: Hand) -> None:
    first, second, third = [await jobs.register(name, 10, "i") for name in "abc"]
    async with aclosing(jobs.follow(LONG)) as changes:
        assert await news(changes) == [("a", "active", 0), ("b", "queued", 1), ("c", "queued", 2)]
        hand.now += 2
        await jobs.get(first["id"])
        await jobs.sweep()
        await jobs.progress(first["id"], 5)
        assert await news(changes) == [("a", "active", 0)]
        await jobs.complete(first["id"])
        assert await news(changes) == [("a", "completed", 0), ("b", "active", 0), ("c", "queued", 1)]
        await jobs.cancel(second["id"])
        await jobs.cancel(third["id"])
        await jobs.clear_ended()
        await jobs.register("d", 10, "i")
        assert await news(changes) == [("d", "active", 0)]  # what came and went while nobody read is past


async def test_a_slow_reader_gets_the_present_and_not_what_it_missed(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    job = await jobs.register("a", 1000, "i")
    async with aclosing(jobs.follow(LONG)) as changes:
        await anext(changes)
        for current in range(1, 501):
            await jobs.progress(job["id"], current)
        [seen] = await anext(changes)
        assert orjson.loads(seen)["current"] == 500


async def test_many_jobs_come_in_pieces_and_of_the_ended_only_the_last(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    for index in range(30):
        await jobs.complete((await jobs.register(f"ended {index}", 1, "i"))["id"])
    open_jobs = [(await jobs.register("open", 1, "i"))["id"] for _ in range(200)]
    seen: list[View] = []
    async with aclosing(jobs.follow(LONG)) as changes:
        while len(seen) < 210:
            seen += map(orjson.loads, await anext(changes))
    assert [job["project"] for job in seen[:10]] == [f"ended {index}" for index in range(20, 30)]
    assert [job["id"] for job in seen[10:]] == open_jobs


async def test_what_is_kept_for_readers_is_little_of_each_job(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))

    async def end(number: int) -> None:
        for index in range(number):
            await jobs.complete((await jobs.register(f"ended {index}", 1, "i"))["id"])
            await anext(changes)

    async with aclosing(jobs.follow(LONG)) as changes:
        await end(10)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await end(100)
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert taken < 100 * 3_000


async def test_a_change_by_another_server_comes_with_the_next_look(redis_url: str, hand: Hand) -> None:
    queue_a, queue_b = await opened(on_redis(redis_url, hand)), await opened(on_redis(redis_url, hand))
    job = await queue_a.register("a", 10, "i")
    await queue_b.sweep()
    async with aclosing(queue_b.follow(LONG)) as changes:
        assert await news(changes) == [("a", "active", 0)]
        await queue_a.complete(job["id"])
        await queue_b.sweep()
        assert await news(changes) == [("a", "completed", 0)]
    await queue_a.close()
    await queue_b.close()


async def test_silence_is_told_and_the_end_ends_it(hand: Hand) -> None:
    jobs = await opened(in_memory(hand))
    async with aclosing(jobs.follow(0.01)) as changes:
        assert await anext(changes) == []
        jobs.end_following()
        with pytest.raises(StopAsyncIteration):
            await anext(changes)
