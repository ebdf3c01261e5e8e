"""Vectors in Redis, for several servers together. Needs the extra `redis`.

Redis keeps to its own limit: `maxmemory` with the policy `volatile-lru` drops the least recently used of these entries
and never a job, which has no expiry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from vecmill.core.protocols import StoreSize
from vecmill.storage.errors import StoreFailed

logger = logging.getLogger(__name__)

PREFIX = b"vecmill:vector:"
# A search waits for this one: rather compute than wait long.
TIMEOUT_SECONDS = 0.25
UNUSED_SECONDS = 30 * 86_400
SCANNED_AT_A_TIME = 1000


class RedisVectors:
    """Bytes by key, shared."""

    def __init__(self, url: str) -> None:
        """Connects when it is first used, and again after Redis was away.

        Raises:
            ValueError, TypeError: the address has what the library does not know.
        """
        self._redis = Redis.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
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
            values = cast(list[bytes | None], self._redis.mget([PREFIX + key for key in keys]))
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def put(self, entries: Mapping[bytes, bytes], used: Iterable[bytes]) -> int:
        """Add entries, and keep those that were used for longer. Raises StoreFailed."""
        with self._failing():
            self._check_policy()
            pipeline = self._redis.pipeline(transaction=False)
            for key, value in entries.items():
                pipeline.set(PREFIX + key, value, ex=UNUSED_SECONDS)
            for key in used:
                pipeline.expire(PREFIX + key, UNUSED_SECONDS)
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
                    tuple[int, list[bytes]], self._redis.scan(cursor, PREFIX + b"*", count=SCANNED_AT_A_TIME)
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
