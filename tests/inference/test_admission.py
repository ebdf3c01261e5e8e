"""Admission: whole requests or none, in turn and within a bounded time, with room for searches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from vecmill.core.errors import Overloaded
from vecmill.core.types import Caller, KeyLimits, Lane
from vecmill.inference.admission import Admission

BULK, SEARCH = Lane.BULK, Lane.INTERACTIVE
SOMEBODY = Caller("somebody")


def admission(requests: int = 10, tokens: int = 100, **options: Any) -> Admission:
    return Admission(requests, tokens, **options)


@dataclass
class RequestQueue:
    """Requests that hold their room until they are told to end."""

    room: Admission
    admitted: list[str] = field(default_factory=list)
    ends: dict[str, asyncio.Event] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def ask(
        self,
        name: str,
        client: str,
        lane: Lane = BULK,
        tokens: int = 1,
        owner: str | None = None,
        counted: int | None = None,
    ) -> None:
        self.ends[name] = asyncio.Event()

        async def hold() -> None:
            async with self.room.admit(Caller(client, owner), lane, tokens) as permit:
                if counted is not None:
                    permit.settle(counted)
                self.admitted.append(name)
                await self.ends[name].wait()

        self.tasks[name] = asyncio.create_task(hold())
        await self.settle()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.tasks[name]
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@asynccontextmanager
async def queue_on(room: Admission) -> AsyncIterator[RequestQueue]:
    queue = RequestQueue(room)
    try:
        yield queue
    finally:
        for task in queue.tasks.values():
            task.cancel()
        await asyncio.gather(*queue.tasks.values(), return_exceptions=True)
    assert (room.requests, room.tokens, room.waiting) == (0, 0, 0)
    assert not room._owners
    assert not any(lane_room.clients or lane_room.turns for lane_room in room._rooms.values())


async def test_room_is_given_back_also_after_an_error() -> None:
    room = admission()
    with pytest.raises(KeyError):
        async with room.admit(SOMEBODY, BULK, 60):
            raise KeyError
    assert (room.requests, room.tokens) == (0, 0)


@pytest.mark.parametrize("lane", Lane)
async def test_what_does_not_fit_is_refused_whole(lane: Lane) -> None:
    room = admission()
    async with room.admit(SOMEBODY, lane, 60):
        with pytest.raises(Overloaded, match="MAX_QUEUED_TOKENS"):
            async with room.admit(SOMEBODY, lane, 41):
                pass
        async with room.admit(SOMEBODY, lane, 28):
            assert room.tokens == 88


async def test_an_estimate_is_settled_by_the_count() -> None:
    room = admission()
    async with room.admit(SOMEBODY, BULK, 90) as permit:
        permit.settle(18)
        async with room.admit(SOMEBODY, BULK, 70):
            assert room.tokens == 88
    assert room.tokens == 0


@pytest.mark.parametrize("lane", Lane)
async def test_a_lone_request_is_admitted_whatever_its_size(lane: Lane) -> None:
    room = admission()
    async with room.admit(SOMEBODY, lane, 5000):
        assert room.tokens == 5000


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64])
async def test_bulk_never_takes_the_room_of_a_search(most: int) -> None:
    room = admission(requests=most)
    async with queue_on(room) as queue:
        for number in range(most + 1):
            await queue.ask(f"bulk {number}", "flood")
        assert 1 <= len(queue.admitted) <= max(1, most - 1)
        await queue.ask("search", "person", SEARCH, 60)
        assert queue.admitted[-1] == "search"


async def test_nor_does_one_huge_request() -> None:
    async with queue_on(admission()) as queue:
        await queue.ask("huge", "flood", tokens=5000)
        await queue.ask("search", "person", SEARCH, 99)
        assert queue.admitted == ["huge", "search"]


async def test_searches_alone_may_take_all_there_is_and_then_bulk_still_gets_on() -> None:
    async with queue_on(admission(requests=8)) as queue:
        for number in range(9):
            await queue.ask(f"search {number}", "people", SEARCH)
        assert len(queue.admitted) == 8
        await queue.ask("bulk", "indexer")
        assert queue.admitted[-1] == "bulk"


async def test_who_waits_is_admitted_in_turn_the_client_with_least_first() -> None:
    async with queue_on(admission(requests=5, tokens=1000, wait_seconds=60)) as queue:
        for number in range(20):
            await queue.ask(f"flood {number}", "flood")
        await queue.ask("neighbour 0", "neighbour")
        await queue.ask("neighbour 1", "neighbour")
        assert queue.admitted == ["flood 0", "flood 1", "flood 2", "flood 3"]
        await queue.end("flood 0")
        await queue.end("flood 1")
        assert queue.admitted[4:] == ["neighbour 0", "neighbour 1"]
        await queue.end("flood 2")
        assert queue.admitted[6:] == ["flood 4"]


async def test_with_little_room_clients_alternate() -> None:
    async with queue_on(admission(requests=2, wait_seconds=60)) as queue:
        for number in range(5):
            await queue.ask(f"flood {number}", "flood")
        await queue.ask("neighbour 0", "neighbour")
        await queue.ask("neighbour 1", "neighbour")
        for _ in range(4):
            await queue.end(queue.admitted[-1])
        assert queue.admitted == ["flood 0", "neighbour 0", "flood 1", "neighbour 1", "flood 2"]


async def test_nobody_overtakes_a_large_request_so_that_it_gets_its_room() -> None:
    async with queue_on(admission(wait_seconds=60)) as queue:
        await queue.ask("first", "one", tokens=80)
        await queue.ask("large", "two", tokens=70)
        await queue.ask("small", "three", tokens=5)
        assert queue.admitted == ["first"]
        await queue.end("first")
        assert queue.admitted == ["first", "large", "small"]


async def test_who_leaves_frees_the_place_waiting_or_not() -> None:
    async with queue_on(admission(requests=2, wait_seconds=60)) as queue:
        for number in range(3):
            await queue.ask(str(number), "one")
        assert queue.room.waiting == 2
        queue.tasks["1"].cancel()
        await queue.settle()
        assert queue.room.waiting == 1
        queue.tasks["0"].cancel()
        await queue.settle()
        assert queue.admitted == ["0", "2"]


async def test_a_wait_is_bounded() -> None:
    room = admission(requests=2, wait_seconds=0.05)
    async with queue_on(room) as queue:
        await queue.ask("0", "one")
        with pytest.raises(Overloaded, match=r"timeout, there was no room within 0.05 s \(QUEUE_TIMEOUT\)"):
            async with room.admit(Caller("other"), BULK, 1):
                pass


async def test_those_who_wait_are_bounded_and_the_largest_crowd_makes_room() -> None:
    async with queue_on(admission(requests=2, wait_seconds=60, most_waiting=16)) as queue:
        for number in range(30):
            await queue.ask(f"flood {number}", "flood")
        assert queue.room.waiting == 16
        assert isinstance(queue.tasks["flood 29"].exception(), Overloaded)
        await queue.ask("neighbour", "neighbour")
        assert queue.room.waiting == 16
        assert isinstance(queue.tasks["flood 16"].exception(), Overloaded)
        await queue.end("flood 0")
        assert queue.admitted == ["flood 0", "neighbour"]


async def test_a_key_at_its_limit_keeps_nobody_else_out() -> None:
    limits = {"small": KeyLimits(requests=1), "narrow": KeyLimits(tokens=10)}
    room = admission(wait_seconds=60, limits_of=lambda owner: limits.get(str(owner), KeyLimits()))
    async with queue_on(room) as queue:
        await queue.ask("small 0", "a", owner="small")
        await queue.ask("small 1", "b", owner="small")  # another address, the same key
        await queue.ask("narrow 0", "c", tokens=50, owner="narrow")  # a lone one, whatever its size
        await queue.ask("narrow 1", "c", tokens=1, owner="narrow")
        await queue.ask("other", "d")
        assert queue.admitted == ["small 0", "narrow 0", "other"]
        await queue.end("small 0")
        await queue.end("narrow 0")
        assert queue.admitted[3:] == ["small 1", "narrow 1"]


@dataclass
class SimulatedDevice:
    """A device's clock, and the tokens that it has computed."""

    now: float = 0.0
    tokens: int = 0


async def refused(room: Admission) -> float:
    with pytest.raises(Overloaded) as error:
        async with room.admit(Caller("late"), BULK, 1):
            pass
    return error.value.retry_after


async def test_retry_after_is_what_warm_up_measured_until_there_is_more() -> None:
    device = SimulatedDevice()
    room = admission(
        2, 100_000, clock=lambda: device.now, tokens_run=lambda: device.tokens, expected_rate=lambda: 500.0
    )
    async with room.admit(SOMEBODY, BULK, 20_000) as permit:
        assert await refused(room) == pytest.approx(10, rel=0.01)  # a quarter of the characters are tokens
        permit.settle(3000)
        assert await refused(room) == pytest.approx(6)


@pytest.mark.parametrize("idle", [0.0, 3600.0])
async def test_retry_after_follows_the_measured_rate_however_long_nothing_was_asked(idle: float) -> None:
    """512 small requests that take 2.6 s: a rate that counts the idle time too says a minute."""
    device = SimulatedDevice(now=idle)
    room = admission(600, 1_000_000, clock=lambda: device.now, tokens_run=lambda: device.tokens)
    async with queue_on(room) as queue:
        for number in range(525):
            await queue.ask(str(number), "flood", tokens=40, counted=10)
        for number in range(100):
            device.now += 2.6 / 512
            device.tokens += 10
            await queue.end(str(number))
        assert await _retry_after(queue) == pytest.approx(2.6 * 425 / 512, rel=0.1)


async def _retry_after(queue: RequestQueue) -> float:
    room = queue.room
    room._wait_seconds = 0.0
    room._bulk.requests = 0
    return await refused(room)


async def test_a_long_request_is_measured_before_it_ends() -> None:
    device = SimulatedDevice()
    room = admission(2, 100_000, clock=lambda: device.now, tokens_run=lambda: device.tokens)
    async with room.admit(SOMEBODY, BULK, 40_000) as permit:
        permit.settle(10_000)
        for _ in range(5):
            device.now += 1
            device.tokens += 1000
        assert await refused(room) == pytest.approx(10, rel=0.05)


async def test_retry_after_is_between_a_second_and_a_minute() -> None:
    device = SimulatedDevice()
    room = admission(2, 1_000_000, clock=lambda: device.now, expected_rate=lambda: 100.0)
    async with room.admit(SOMEBODY, BULK, 4):
        assert await refused(room) == 1
    async with room.admit(SOMEBODY, BULK, 900_000):
        assert await refused(room) == 60
