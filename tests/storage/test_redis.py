"""Redis: what each key has in progress at several servers, how much is put there, and what is seen of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import redis

from tests.redis_server import redis_server
from tests.servers import free_port
from vecmill.core.errors import Overloaded
from vecmill.core.types import Caller, KeyLimits, Lane
from vecmill.inference import shared_limits
from vecmill.inference.admission import Admission
from vecmill.storage.redis import VECTOR, RedisVectors
from vecmill.storage.redis_connection import MemoryFacts, redis_facts
from vecmill.storage.redis_limits import EXPIRES_MS, IN_USE, RedisUse

ANN = Caller("somebody", "name:ann")


@pytest.fixture(scope="module")
def any_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def url(any_redis: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Redis with nothing in it, and time for its answers however busy the machine is."""
    monkeypatch.setattr("vecmill.storage.redis_limits.TIMEOUT_SECONDS", 20.0)
    with redis.Redis.from_url(any_redis) as client:
        client.flushall()
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
    return any_redis


@asynccontextmanager
async def servers(
    url: str, limits: KeyLimits, count: int = 3, wait_seconds: float = 10.0
) -> AsyncIterator[list[Admission]]:
    """So many servers whose keys all have the same limits."""
    async with AsyncExitStack() as stack:
        rooms = [
            Admission(100, 10_000, wait_seconds=wait_seconds, limits_of=lambda owner: limits) for _ in range(count)
        ]
        for room in rooms:
            room.share(RedisUse(url))
            stack.push_async_callback(room.close)
        yield rooms


async def settled(client: redis.Redis) -> None:
    """Wait until no server reports anything in progress."""
    async with asyncio.timeout(5):
        while client.keys(IN_USE + "*"):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("limits", "most"), [(KeyLimits(requests=3), 3), (KeyLimits(tokens=50), 5), (KeyLimits(requests=2, tokens=50), 2)]
)
async def test_a_limit_holds_over_all_servers_together(url: str, limits: KeyLimits, most: int) -> None:
    running, longest = 0, 0

    async def ask(room: Admission) -> None:
        nonlocal running, longest
        async with room.admit(ANN, Lane.BULK, 10) as permit:
            running += 1
            longest = max(longest, running)
            await asyncio.sleep(0.005)
            permit.settle(10)
            running -= 1

    async with servers(url, limits) as rooms:
        await asyncio.gather(*(ask(rooms[number % 3]) for number in range(30)))
        with redis.Redis.from_url(url) as client:
            await settled(client)
    assert longest == most


async def test_who_may_not_wait_is_refused_and_told_the_limit(url: str) -> None:
    async with servers(url, KeyLimits(requests=1), 2, wait_seconds=0) as (first, second):
        async with first.admit(ANN, Lane.BULK, 10):
            with pytest.raises(Overloaded, match="1 requests of this API key are in progress") as refused:
                async with second.admit(ANN, Lane.BULK, 10):
                    pass
            assert refused.value.retry_after >= 1
            with pytest.raises(Overloaded, match="`requests`"):
                async with second.counted_for_key(ANN.owner):
                    pass
            async with second.admit(Caller("else", "name:ben"), Lane.BULK, 10):
                pass
        with redis.Redis.from_url(url) as client:
            await settled(client)
        async with second.counted_for_key(ANN.owner):
            pass


async def test_fewer_tokens_than_estimated_make_room_elsewhere(url: str) -> None:
    async with servers(url, KeyLimits(tokens=100), 2) as (first, second), first.admit(ANN, Lane.BULK, 90) as permit:
        permit.settle(10)
        async with asyncio.timeout(5), second.admit(ANN, Lane.BULK, 80):
            pass


async def test_what_a_killed_server_had_is_free_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmill.storage.redis_limits.EXPIRES_MS", 300)
    killed = RedisUse(url)
    assert (await killed.exchange("name:ann", 0, 0, 10, KeyLimits(requests=1))).granted
    await killed.close()  # and reports nothing any more
    async with servers(url, KeyLimits(requests=1), 1) as [room], asyncio.timeout(5), room.admit(ANN, Lane.BULK, 10):
        pass


async def test_a_long_request_keeps_its_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmill.storage.redis_limits.EXPIRES_MS", 400)
    monkeypatch.setattr(shared_limits, "RENEW_SECONDS", 0.1)
    async with (
        servers(url, KeyLimits(requests=1), 2, wait_seconds=1.2) as (first, second),
        first.admit(ANN, Lane.BULK, 10),
    ):
        with pytest.raises(Overloaded, match="QUEUE_TIMEOUT"):
            async with second.admit(ANN, Lane.BULK, 10):
                pass
    assert EXPIRES_MS > 3 * 4000


async def test_a_request_whose_client_left_while_it_waited_takes_nothing(url: str) -> None:
    async with servers(url, KeyLimits(requests=1), 2) as (first, second):
        async with first.admit(ANN, Lane.BULK, 10):
            waiting = [asyncio.create_task(second.admit(ANN, Lane.BULK, 10).__aenter__()) for _ in range(5)]
            await asyncio.sleep(0.05)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        async with asyncio.timeout(5), second.admit(ANN, Lane.BULK, 10):
            pass


async def test_without_redis_each_server_keeps_the_limit_and_with_it_again_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_limits, "RETRY_SECONDS", 0.2)
    port = free_port()
    async with (
        servers(f"redis://127.0.0.1:{port}/0", KeyLimits(requests=1), 2, wait_seconds=0) as (first, second),
        first.admit(ANN, Lane.BULK, 1),
        second.admit(ANN, Lane.BULK, 1),
    ):
        with pytest.raises(Overloaded, match="`requests`"):
            async with first.admit(ANN, Lane.BULK, 1):
                pass
        with redis_server(tmp_path, port=port) as url, redis.Redis.from_url(url) as client:
            async with asyncio.timeout(10):  # both report what they have
                while sum(client.hlen(key) for key in client.keys(IN_USE + "*")) < 2:
                    await asyncio.sleep(0.02)
            stored = str([client.keys("*"), *(client.hgetall(key) for key in client.keys(IN_USE + "*"))])
            assert "ann" not in stored


@pytest.mark.parametrize(
    ("limited", "policy", "room"),
    [(False, "noeviction", True), (True, "noeviction", False), (True, "volatile-lru", True)],
)
def test_vectors_leave_room_for_jobs_where_redis_drops_none(url: str, limited: bool, policy: str, room: bool) -> None:
    entries = {b"%016d" % number: b"v" * 1000 for number in range(200)}
    with redis.Redis.from_url(url) as client:
        client.set("of another program", "x" * 2_000_000)
        client.config_set("maxmemory-policy", policy)
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", int(1.05 * used) if limited else 0)
        store = RedisVectors(url)
        assert store.put(entries, ()) == (0 if room else len(entries))
        kept = client.keys(VECTOR + b"*")
        assert bool(kept) is room
        left = [client.ttl(key) for key in kept]
        assert all(seconds > 0 for seconds in left if seconds != -2)  # -2: Redis has dropped it since
        client.set("a job finds room", "x" * 1000)
        store.close()


def test_without_maxmemory_the_cache_s_own_bound_holds(url: str) -> None:
    store = RedisVectors(url, 1000)  # Redis itself takes more
    assert store.put({b"k" * 16: b"v"}, ()) == 1
    assert store.get([b"k" * 16]) == {}
    store.close()


@pytest.mark.parametrize(
    ("most", "policy", "problem"),
    [
        (0, "noeviction", "no maxmemory"),
        (10**9, "noeviction", "jobs may find no room"),
        (10**9, "allkeys-lru", "may drop jobs"),
        (10**9, "volatile-lru", None),
        (10**9, "volatile-lfu", None),
    ],
)
def test_what_is_wrong_with_redis_memory(most: int, policy: str, problem: str | None) -> None:
    said = MemoryFacts(1, most, policy).problem()
    assert said is None if problem is None else problem in str(said)


def test_facts(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        for name in ("a", "b"):
            client.set(f"vecmill:replica:{name}", "{}", ex=10)
        client.config_set("save", "3600 1")
        facts = redis_facts(url)
        client.config_set("save", "")
        unsaved = redis_facts(url)
    assert (facts.role, facts.mode, facts.servers, facts.keeps) == ("master", "standalone", 2, "snapshots")
    assert facts.version[0].isdigit()
    assert 0 < facts.latency_ms < 1000
    assert (unsaved.keeps, unsaved.memory.most) == (None, 0)
    assert facts.memory.used > 0
