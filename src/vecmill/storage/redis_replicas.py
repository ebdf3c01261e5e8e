"""Which servers are there, in Redis, or Valkey. Needs the extra `redis`.

Source: https://redis.io/docs/latest/commands/set/ (EX, NX)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from redis.exceptions import RedisError, ResponseError

from vecmill.core.protocols import REPLICA_BYTES, StoredReplica, StoreFailed
from vecmill.storage.redis_connection import JOBS_TIMEOUT_SECONDS, REPLICA, connect

REPLICAS_MAX = 128
REPLICA_KEPT_SECONDS = 900
"""For how long a server that was killed is still known. Another value needs other keys: ages are counted by it."""
REPLICA_STALE_SECONDS = 10.0
"""After which a record's place may be taken: its server would have written again twice."""


class RedisReplicas:
    """Who is there: a record of each server, under one of REPLICAS_MAX numbered keys.

    Numbered keys in place of an index: a look at them is bounded, whatever else somebody writes there. Ages are what
    has passed of a key's expiry, so that only Redis' clock counts.
    """

    def __init__(self, url: str) -> None:
        self._redis = connect(url)
        self._key: str | None = None

    async def write(self, record: bytes, *, name: bytes, own: bytes) -> bool:
        """As `ReplicaStore` says."""
        with _failing_replicas():
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
                if self._key is None or not await self._holds(self._key, own):
                    self._key = await self._take(name)
                    return self._key is not None and bool(await self._put(self._key, record))
                return bool(await self._put(self._key, record))

    async def _put(self, key: str, record: bytes) -> bool:
        return bool(await self._redis.set(key, record, ex=REPLICA_KEPT_SECONDS))

    async def _holds(self, key: str, own: bytes) -> bool:
        """Another server may have taken the key while this one could not write."""
        try:
            return bool(await self._redis.getrange(key, 0, len(own) - 1) == own)
        except ResponseError as error:
            if _is_wrong_type(error):
                return False
            raise

    async def _take(self, name: bytes) -> str | None:
        """A key for this server: that of its predecessor, else a free one, else the one unused for longest.

        Two servers that choose the same one at the same time find out when they write again.
        """
        found = await self._read()
        stale = {place: each for place, each in found.items() if each.age_seconds >= REPLICA_STALE_SECONDS}
        for place, each in stale.items():
            if each.record is not None and each.record.startswith(name):
                return f"{REPLICA}{place}"
        for place in range(REPLICAS_MAX):
            key = f"{REPLICA}{place}"
            if place not in found and await self._redis.set(key, b"", ex=REPLICA_KEPT_SECONDS, nx=True):
                return key
        longest = max(stale, key=lambda place: stale[place].age_seconds, default=None)
        return None if longest is None else f"{REPLICA}{longest}"

    async def read(self) -> Sequence[StoredReplica]:
        """As `ReplicaStore` says."""
        with _failing_replicas():
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
                return list((await self._read()).values())

    async def _read(self) -> Mapping[int, StoredReplica]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for place in range(REPLICAS_MAX):
                pipeline.getrange(f"{REPLICA}{place}", 0, REPLICA_BYTES)
                pipeline.pttl(f"{REPLICA}{place}")
            answers = await pipeline.execute(raise_on_error=False)
        found: dict[int, StoredReplica] = {}
        for place, (record, left) in enumerate(zip(answers[::2], answers[1::2], strict=True)):
            for answer in (record, left):
                if isinstance(answer, Exception) and not _is_wrong_type(answer):
                    raise answer
            if record != b"":  # what no key has
                found[place] = _stored_replica(record, left)
        return found

    async def remove(self, *, own: bytes) -> None:
        """As `ReplicaStore` says."""
        with _failing_replicas():
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
                if self._key is not None and await self._holds(self._key, own):
                    await self._redis.delete(self._key)

    async def close(self) -> None:
        """Close the connections. Raises nothing."""
        await self._redis.aclose()


@contextmanager
def _failing_replicas() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreFailed(type(error).__name__) from None  # its text may repeat the address


def _is_wrong_type(error: Exception) -> bool:
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


def _stored_replica(record: bytes | Exception, left: int) -> StoredReplica:
    """`left`: milliseconds until the key expires; negative where it never does, as no server's does."""
    age = REPLICA_KEPT_SECONDS - left / 1000
    usable = isinstance(record, bytes) and len(record) <= REPLICA_BYTES and 0 <= age <= REPLICA_KEPT_SECONDS
    return StoredReplica(record if usable and isinstance(record, bytes) else None, age)
