"""A queue on each kind of store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

from tests.jobs.queues import Hand, in_memory, on_redis, on_sqlite, opened
from tests.redis_server import redis_server
from vecmill.jobs.queue import JobQueue, JobStore


@pytest.fixture(scope="session")
def any_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis_url(any_redis: str) -> str:
    """A Redis with nothing in it."""
    with redis.Redis.from_url(any_redis) as client:
        client.flushall()
    return any_redis


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def jobs(request: pytest.FixtureRequest, hand: Hand, tmp_path: Path) -> AsyncIterator[JobQueue]:
    """One place, a lease of 100 s."""
    store: JobStore
    match request.param:
        case "memory":
            store = in_memory(hand)
        case "sqlite":
            store = on_sqlite(tmp_path, hand)
        case _:
            store = on_redis(request.getfixturevalue("redis_url"), hand)
    queue = await opened(store)
    yield queue
    await queue.close()
