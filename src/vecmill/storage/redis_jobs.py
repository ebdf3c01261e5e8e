"""The jobs that several servers share, in Redis. Knows records, not what is in them. Needs the extra `redis`.

Source: https://redis.io/docs/latest/develop/using-commands/transactions/ (optimistic locking)
"""

from __future__ import annotations

import asyncio

from redis.exceptions import RedisError, WatchError

from vecmill.core.errors import JobsUnavailable
from vecmill.core.protocols import JobChanges, StoredJobs
from vecmill.storage.redis import TIMEOUT_SECONDS, connect

PREFIX = "vecmill:jobs"
OPEN = f"{PREFIX}:open"
"""Hash: id to record."""
ENDED = f"{PREFIX}:ended"
"""Sorted set: records by number."""
META = f"{PREFIX}:meta"
"""Changes with every commit."""


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
            async with asyncio.timeout(TIMEOUT_SECONDS), self._redis.pipeline(transaction=True) as pipeline:
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
            async with asyncio.timeout(TIMEOUT_SECONDS), self._redis.pipeline(transaction=True) as pipeline:
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
