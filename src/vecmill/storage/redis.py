"""What several servers keep together in Redis, or Valkey: their jobs and their vectors. Needs the extra `redis`.

Redis keeps to its own limit: `maxmemory` with the policy `volatile-lru` drops the least recently used vectors and never
a job, which has no expiry. Where Redis would not drop vectors by itself, none are added before the jobs lack room.

Source: https://redis.io/docs/latest/develop/using-commands/transactions/ (optimistic locking)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, WatchError
from redis.retry import Retry

from vecmill.core.errors import JobsUnavailable
from vecmill.core.protocols import JobChanges, StoredJobs, StoreFailed, StoreSize
from vecmill.storage.redis_connection import JOBS_TIMEOUT_SECONDS, MemoryFacts, connect

logger = logging.getLogger(__name__)

VECTORS_TIMEOUT_SECONDS = 0.25  # a search waits: computing a vector again is better than waiting long for it

JOBS = "vecmill:jobs"
OPEN = f"{JOBS}:open"
"""Hash: id to record."""
ENDED = f"{JOBS}:ended"
"""Sorted set: records by number."""
META = f"{JOBS}:meta"
"""Changes with every commit."""

VECTOR = b"vecmill:vector:"
UNUSED_SECONDS = 30 * 86_400
MAX_BYTES = 10_737_418_240  # as the default of CACHE_MAX_BYTES
ROOM_EVERY_SECONDS = 5.0  # how old the account of Redis' memory may be
SCANNED_AT_A_TIME = 1000


class RedisJobs:
    """All servers at one Redis have the same jobs. Nothing expires."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url)

    async def read(self, after: int) -> StoredJobs:
        """All at one moment, in one round trip; of the ended jobs those with a number above `after`.

        Raises:
            JobsUnavailable: Redis does not answer.
        """
        try:
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS), self._redis.pipeline(transaction=True) as pipeline:
                pipeline.time()
                pipeline.get(META)
                pipeline.hgetall(OPEN)
                pipeline.zrange(ENDED, f"({after}", "+inf", byscore=True)
                (seconds, microseconds), meta, opened, ended = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None
        records = {job_id.decode(): record for job_id, record in opened.items()}
        return StoredJobs(records, ended, meta, seconds + microseconds / 1e6)

    async def commit(self, seen: bytes | None, changes: JobChanges) -> bool:
        """Write all of it if `meta` is still what was `seen`, else nothing; whether it was.

        Raises:
            JobsUnavailable: Redis does not answer, or has no room.
        """
        try:
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS), self._redis.pipeline(transaction=True) as pipeline:
                await pipeline.watch(META)
                if await pipeline.get(META) != seen:
                    return False
                pipeline.multi()  # type: ignore[no-untyped-call]
                if changes.whole:
                    pipeline.delete(OPEN, ENDED)
                if changes.closed:
                    pipeline.hdel(OPEN, *changes.closed)
                if changes.open:
                    pipeline.hset(OPEN, items=[part for pair in changes.open.items() for part in pair])
                if changes.ended:
                    pipeline.zadd(ENDED, {record: number for number, record in changes.ended})
                pipeline.zremrangebyscore(ENDED, "-inf", changes.forgotten)
                pipeline.set(META, changes.meta)
                await pipeline.execute()
        except WatchError:
            return False
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None
        return True

    async def close(self) -> None:
        """Close the connections. Raises nothing."""
        await self._redis.aclose()


def _unavailable(error: Exception) -> JobsUnavailable:
    # Not its text: it may repeat the address, which may have a password.
    return JobsUnavailable(f"Redis cannot be used for the jobs ({type(error).__name__}).")


class RedisVectors:
    """Bytes by key, shared."""

    def __init__(self, url: str, max_bytes: int = MAX_BYTES) -> None:
        """Connects when it is first used, and reconnects after Redis was away. `max_bytes` counts where Redis has no
        `maxmemory`.

        Raises:
            ValueError, TypeError: the client library does not know an option or a part of the address.
        """
        self._redis = Redis.from_url(
            url,
            socket_timeout=VECTORS_TIMEOUT_SECONDS,
            socket_connect_timeout=VECTORS_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 1),
        )
        self._redis.connection_pool.make_connection()  # not connected yet; it would raise at each use otherwise
        self._max_bytes = max_bytes
        self._has_room, self._looked_at = True, -inf
        self._told = ""

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, MemoryError) as error:
            raise StoreFailed(f"Redis: {error}") from None

    def get(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """Those of the keys that are there. Raises StoreFailed."""
        with self._failing():
            values = cast(list[bytes | None], self._redis.mget([VECTOR + key for key in keys]))
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def put(self, entries: Mapping[bytes, bytes], used: Iterable[bytes]) -> int:
        """Add entries while there is room, and keep those that were used for longer; how many there was no room for.

        Raises:
            StoreFailed: Redis does not answer, or takes nothing.
        """
        with self._failing():
            if monotonic() - self._looked_at >= ROOM_EVERY_SECONDS:
                self._look()
            pipeline = self._redis.pipeline(transaction=False)
            for key, value in entries.items() if self._has_room else ():
                pipeline.set(VECTOR + key, value, ex=UNUSED_SECONDS)
            for key in used:
                pipeline.expire(VECTOR + key, UNUSED_SECONDS)
            pipeline.execute()
        return 0 if self._has_room else len(entries)

    def _look(self) -> None:
        """Find out whether there is room for vectors; say once where Redis' settings are not the right ones."""
        facts = MemoryFacts.of(cast(dict[str, object], self._redis.info("memory")))
        most = facts.max_vectors(self._max_bytes)
        self._has_room, self._looked_at = most is None or facts.used < most, monotonic()
        told = facts.problem() or ""
        if not self._has_room:
            told = f"Redis is full, so that no vectors are added: {told}"
        if told and told != self._told:
            logger.warning(told)
        self._told = told

    def clear(self) -> int:
        """Drop every vector. Raises StoreFailed."""
        dropped = 0
        with self._failing():
            cursor = 0
            while True:
                cursor, keys = cast(
                    tuple[int, list[bytes]], self._redis.scan(cursor, VECTOR + b"*", count=SCANNED_AT_A_TIME)
                )
                if keys:
                    dropped += self._redis.unlink(*keys)
                if cursor == 0:
                    return dropped

    def size(self) -> StoreSize:
        """Keys and memory of all of Redis: it does not count by prefix. Raises StoreFailed."""
        with self._failing():
            info = cast(dict[str, int], self._redis.info("memory"))
            return StoreSize(self._redis.dbsize(), info["used_memory"])

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
