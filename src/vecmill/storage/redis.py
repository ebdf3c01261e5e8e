"""What several servers keep together in Redis, or Valkey: their jobs, their vectors, and who is there. Needs the extra
`redis`.

Redis keeps to its own limit: `maxmemory` with the policy `volatile-lru` drops the least recently used vectors and never
a job, which has no expiry. Where Redis would not drop vectors by itself, none are added before the jobs lack room.

Source: https://redis.io/docs/latest/develop/programmability/eval-intro/ (scripts are atomic)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic
from typing import cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from vecmill.core.errors import JobsUnavailable
from vecmill.core.protocols import JobChanges, StoredJobs, StoreFailed, StoreSize
from vecmill.storage.redis_connection import JOBS_TIMEOUT_SECONDS, MemoryFacts, NewerFormat, connect, look_first

logger = logging.getLogger(__name__)

VECTORS_TIMEOUT_SECONDS = 0.25  # a search waits: computing a vector again is better than waiting long for it

JOBS = "vecmill:jobs"
OPEN = f"{JOBS}:open"
"""Hash: id to record."""
ENDED = f"{JOBS}:ended"
"""Sorted set: records by number."""
META = f"{JOBS}:meta"
"""Changes with every commit."""

TURN = f"{JOBS}:turn"
"""Of a server that lost too often; expires."""
TURN_MS = 500

# KEYS: OPEN, ENDED, META. ARGV: META as it was seen, as it is to be, whether this is all there is, the number up to
# which ended jobs are forgotten; then three lists, each after its length: ids open no more, open jobs as id and record,
# ended ones as number and record. Nothing is written if META is not what was seen.
COMMIT = """
if (redis.call('GET', KEYS[3]) or '') ~= ARGV[1] then return 0 end
if ARGV[3] == '1' then redis.call('DEL', KEYS[1], KEYS[2]) end
local at = 5
local function each(parts, write)
  local count = tonumber(ARGV[at])
  at = at + 1
  for _ = 1, count do
    write(ARGV[at], ARGV[at + 1])
    at = at + parts
  end
end
each(1, function(id) redis.call('HDEL', KEYS[1], id) end)
each(2, function(id, record) redis.call('HSET', KEYS[1], id, record) end)
each(2, function(number, record) redis.call('ZADD', KEYS[2], number, record) end)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[4])
redis.call('SET', KEYS[3], ARGV[2])
return 1
"""

VECTOR = b"vecmill:vector:"
UNUSED_SECONDS = 30 * 86_400
MAX_BYTES = 10_737_418_240  # as the default of CACHE_MAX_BYTES
ROOM_EVERY_SECONDS = 5.0  # how old the account of Redis' memory may be
SCANNED_AT_A_TIME = 1000


class RedisJobs:
    """All servers at one Redis have the same jobs. Nothing expires."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url)
        self._commit = self._redis.register_script(COMMIT)

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
                pipeline.get(TURN)
                (seconds, microseconds), meta, opened, ended, turn = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None
        records = {job_id.decode(errors="replace"): record for job_id, record in opened.items()}
        return StoredJobs(records, ended, meta, seconds + microseconds / 1e6, turn)

    async def commit(self, seen: bytes | None, changes: JobChanges) -> bool:
        """Write all of it if `meta` is still what was `seen`, else nothing; whether it was.

        Raises:
            JobsUnavailable: Redis does not answer, or has no room.
        """
        written: list[bytes | str | int] = [seen or b"", changes.meta, int(changes.whole), changes.forgotten]
        for entries in (
            [(job_id,) for job_id in changes.closed],
            [*changes.open.items()],
            changes.ended,
        ):
            written += [len(entries), *(part for entry in entries for part in entry)]
        try:
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
                return bool(await self._commit(keys=[OPEN, ENDED, META], args=written))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None

    async def take_turn(self, turn: bytes) -> bool:
        """Ask the other servers to let this one write first, for a moment; whether nobody else has asked before.

        Raises:
            JobsUnavailable: Redis does not answer.
        """
        try:
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
                return bool(await self._redis.set(TURN, turn, nx=True, px=TURN_MS))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from None

    async def end_turn(self, turn: bytes) -> None:
        """Let the others go on. Where that fails, or this server was too slow, the turn expires by itself."""
        with suppress(RedisError, OSError):
            async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
                if await self._redis.get(TURN) == turn:
                    await self._redis.delete(TURN)

    async def close(self) -> None:
        """Close the connections. Raises nothing."""
        await self._redis.aclose()


def _unavailable(error: Exception) -> JobsUnavailable:
    # Not its text: it may repeat the address, which may have a password.
    reason = str(error) if isinstance(error, NewerFormat) else type(error).__name__
    return JobsUnavailable(f"Redis cannot be used for the jobs ({reason}).")


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
            redis_connect_func=look_first,
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
