"""What several servers keep together in Redis, or Valkey: their jobs, their vectors, and who is there. Needs the extra
`redis`.

Redis keeps to its own limit: `maxmemory` with the policy `volatile-lru` drops the least recently used vectors and never
a job, which has no expiry.

Sources: https://redis.readthedocs.io/en/stable/connections.html and
https://redis.io/docs/latest/develop/using-commands/transactions/ (optimistic locking)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError, WatchError
from redis.retry import Retry

from vecmill.core.errors import JobsUnavailable
from vecmill.core.protocols import JobChanges, StoredJobs, StoredReplica, StoreFailed, StoreSize

logger = logging.getLogger(__name__)

JOBS_TIMEOUT_SECONDS = 1.0  # a client of the jobs waits meanwhile
VECTORS_TIMEOUT_SECONDS = 0.25  # a search waits: computing a vector again is better than waiting long for it
MAX_CONNECTIONS = 32

JOBS = "vecmill:jobs"
OPEN = f"{JOBS}:open"
"""Hash: id to record."""
ENDED = f"{JOBS}:ended"
"""Sorted set: records by number."""
META = f"{JOBS}:meta"
"""Changes with every commit."""

VECTOR = b"vecmill:vector:"
UNUSED_SECONDS = 30 * 86_400
SCANNED_AT_A_TIME = 1000

REPLICA = "vecmill:replica:"
REPLICAS_MAX = 128
REPLICA_BYTES = 8192
REPLICA_KEPT_SECONDS = 900
"""For how long a server that was killed is still known. Another value needs other keys: ages are counted by it."""
REPLICA_STALE_SECONDS = 10.0
"""After which a record's place may be taken: its server would have written again twice."""


def connect(url: str) -> AsyncRedis:
    """A client that connects when it is first used, and reconnects after Redis was away. Answers are bytes.

    Raises:
        ValueError, TypeError: the client library does not know an option or a part of the address.
    """
    client = AsyncRedis.from_url(
        url,
        socket_timeout=JOBS_TIMEOUT_SECONDS,
        socket_connect_timeout=JOBS_TIMEOUT_SECONDS,
        retry=AsyncRetry(NoBackoff(), 1),  # once, for a connection that Redis has closed meanwhile
        max_connections=MAX_CONNECTIONS,
    )
    # Does not connect yet. It raises here for an unknown option, which would otherwise raise at each use.
    client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    return client


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

    def __init__(self, url: str) -> None:
        """Connects when it is first used, and reconnects after Redis was away.

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
        self._checked = False

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
        """Add entries, and keep those that were used for longer. Raises StoreFailed."""
        with self._failing():
            self._check_policy()
            pipeline = self._redis.pipeline(transaction=False)
            for key, value in entries.items():
                pipeline.set(VECTOR + key, value, ex=UNUSED_SECONDS)
            for key in used:
                pipeline.expire(VECTOR + key, UNUSED_SECONDS)
            pipeline.execute()
        return 0

    def _check_policy(self) -> None:
        """Say once where Redis would refuse work, or drop jobs, in place of old vectors."""
        if self._checked:
            return
        self._checked = True
        info = cast(dict[str, object], self._redis.info("memory"))
        policy = info.get("maxmemory_policy")
        if not info.get("maxmemory") or policy != "volatile-lru":
            logger.warning(
                "Redis has maxmemory %s and the policy %s: set a limit, and maxmemory-policy volatile-lru, so that it "
                "drops old vectors before anything else",
                info.get("maxmemory_human"),
                policy,
            )

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


def ping(url: str) -> str:
    """Its version.

    Raises:
        StoreFailed: it does not answer, or not this user. The message has nothing of the address.
    """
    return asyncio.run(_version(url))


async def _version(url: str) -> str:
    try:
        async with connect(url) as client:
            return str((await client.info("server"))["redis_version"])
    except (RedisError, OSError, ValueError, KeyError) as error:
        raise StoreFailed(type(error).__name__) from None
