"""Whether a Redis answers. Needs the extra `redis`."""

from __future__ import annotations

import asyncio

from redis.exceptions import RedisError

from vecmill.storage.errors import StoreFailed
from vecmill.storage.redis import connect


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
