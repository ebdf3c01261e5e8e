"""How this server talks to Redis, or Valkey, and whether that one is fit for it. Needs the extra `redis`.

Sources: https://redis.readthedocs.io/en/stable/connections.html and https://redis.io/docs/latest/commands/info/
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Self

from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, InvalidResponse, NoPermissionError, RedisError, ResponseError

from vecmill import __version__
from vecmill.core.errors import StartupError
from vecmill.core.protocols import StoreFailed
from vecmill.storage.formats import FORMAT

logger = logging.getLogger(__name__)

JOBS_TIMEOUT_SECONDS = 1.0  # a client of the jobs waits meanwhile
MAX_CONNECTIONS = 32
OLDEST = (6, 2)  # has ZRANGE by score
SHARE_OF_VECTORS = 0.9  # of Redis' memory where it drops none of them: the rest is for the jobs
PINGS = 20
FORMAT_KEY = "vecmill:format"
REPLICA = "vecmill:replica:"
"""What the keys of the servers at this Redis begin with."""


class NewerFormat(RedisError):
    """What is in this Redis is of a format that this version does not read; the message has nothing of the address."""


def _refuse_newer(stored: Any) -> None:
    """Raises NewerFormat where a newer version has written what is there."""
    if isinstance(stored, bytes) and stored.isdigit() and int(stored[:9]) > FORMAT:
        raise NewerFormat(
            f"What is in Redis is of format {int(stored[:9])}, which is newer than what vecmill {__version__} reads "
            f"({FORMAT}). Install the version that wrote it again, or one that is newer; or begin with nothing, in "
            f"another database (REDIS_URL with `/1`)."
        )


def look_first(connection: Any) -> None:
    """Begin a connection: a Redis that was away, or is another one now, may have been written by a newer version."""
    connection.on_connect()
    connection.send_command("GET", FORMAT_KEY)
    with suppress(ResponseError):  # it is no mark, or may not be read
        _refuse_newer(connection.read_response())


async def _look_first(connection: Any) -> None:
    """As `look_first`. A Redis without a mark gets it: it was empty, or away when the server was started."""
    await connection.on_connect()
    await connection.send_command("GET", FORMAT_KEY)
    with suppress(ResponseError):
        _refuse_newer(stored := await connection.read_response())
        if stored is None:
            await connection.send_command("SET", FORMAT_KEY, FORMAT)
            await connection.read_response()


def connect(url: str, *, looks: bool = True) -> AsyncRedis:
    """A client that connects when it is first used, and reconnects after Redis was away. Answers are bytes.

    Args:
        looks: whether each connection is refused where a newer version has written what is there.

    Raises:
        ValueError, TypeError: the client library does not know an option or a part of the address.
    """
    client = AsyncRedis.from_url(
        url,
        socket_timeout=JOBS_TIMEOUT_SECONDS,
        socket_connect_timeout=JOBS_TIMEOUT_SECONDS,
        retry=AsyncRetry(NoBackoff(), 1),  # once, for a connection that Redis has closed meanwhile
        max_connections=MAX_CONNECTIONS,
        redis_connect_func=_look_first if looks else None,
    )
    # Does not connect yet. It raises here for an unknown option, which would otherwise raise at each use.
    client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    return client


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Redis' memory, and what it does when that is full."""

    used: int
    """Bytes."""
    most: int
    """Bytes: `maxmemory`; 0: no limit."""
    policy: str

    @classmethod
    def of(cls, info: Mapping[str, object]) -> Self:
        """From the section `memory` of INFO. A service that hides a part of it is taken not to limit anything."""
        used, most = (int(str(info.get(name) or 0)) for name in ("used_memory", "maxmemory"))
        return cls(used, most, str(info.get("maxmemory_policy") or "noeviction"))

    def shown(self) -> str:
        """For people."""
        limit = f"of {self.most / 1e6:.0f} MB" if self.most else "without maxmemory"
        return f"{self.used / 1e6:.1f} MB {limit}, {self.policy}"

    def max_vectors(self, max_bytes: int) -> int | None:
        """The used bytes from which on no vectors are added; None where Redis drops old ones by itself."""
        if not self.most:
            return max_bytes
        return int(self.most * SHARE_OF_VECTORS) if self.policy == "noeviction" else None

    def problem(self) -> str | None:
        """What is wrong for vectors beside jobs, as a sentence with the cure; None where all is right."""
        if self.most and self.policy.startswith("volatile-"):
            return None
        cure = "set `maxmemory`, and `maxmemory-policy volatile-lru`, so that it drops old vectors before anything else"
        if not self.most:
            return f"Redis has no maxmemory: {cure}."
        if self.policy == "noeviction":
            return f"Redis has the policy noeviction and drops no vectors, so that jobs may find no room: {cure}."
        return f"Redis has the policy {self.policy}, which may drop jobs: {cure}."


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """A Redis as it is now."""

    version: str
    mode: str
    """`standalone`, `sentinel` or `cluster`."""
    role: str
    """`master`, or `slave` where it only follows another Redis."""
    latency_ms: float
    """The median round trip."""
    memory: MemoryFacts
    keeps: str | None
    """How its data outlive it: `appendonly`, `snapshots`; None where they do not, or it does not say."""
    servers: int
    """Of vecmill that have reported lately, this one too if it runs."""


def redis_facts(url: str) -> RedisFacts:
    """Look at Redis. Takes a few seconds at the most.

    Raises:
        StartupError: it answers, and cannot be used as it is: one sentence, with the cure.
        StoreFailed: it does not answer. No message has anything of the address.
    """
    try:
        return asyncio.run(_facts(url))
    except (ValueError, TypeError, KeyError) as error:
        raise StoreFailed(type(error).__name__) from None


async def _facts(url: str) -> RedisFacts:
    async with connect(url, looks=False) as client:
        info = await _usable(client)
        try:
            seconds = [await _ping(client) for _ in range(PINGS)]
            servers = [key async for key in client.scan_iter(f"{REPLICA}*", count=1000)]
            keeps = await _keeps(client, info)
        except (RedisError, OSError) as error:
            raise StoreFailed(type(error).__name__) from None
    return RedisFacts(
        version=_version(info),
        mode=str(info.get("redis_mode", "standalone")),
        role=str(info.get("role", "master")),
        latency_ms=1000 * median(seconds),
        memory=MemoryFacts.of(info),
        keeps=keeps,
        servers=len(servers),
    )


async def _ping(client: AsyncRedis) -> float:
    began = perf_counter()
    await client.ping()
    return perf_counter() - began


async def _keeps(client: AsyncRedis, info: Mapping[str, Any]) -> str | None:
    if int(info.get("aof_enabled") or 0):
        return "appendonly"
    with suppress(ResponseError):  # a service may not show its configuration
        if (await client.config_get("save")).get("save"):
            return "snapshots"
    return None


async def check_usable(url: str) -> None:
    """Find out whether Redis can be used at all. One that does not answer now may do so later: that is no error.

    Raises:
        StartupError: it answers, and only another configuration helps: one sentence, with the cure.
    """
    try:
        async with connect(url, looks=False) as client:
            await _usable(client)
            with suppress(RedisError, OSError):  # it is full, or only follows another; the doctor says so
                await client.set(FORMAT_KEY, FORMAT)
    except StoreFailed as error:
        logger.warning("Redis does not answer (%s): /jobs answers 503 until it does", error)


async def _usable(client: AsyncRedis) -> dict[str, Any]:
    """What INFO says. Raises StoreFailed, StartupError."""
    try:
        async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
            info: dict[str, Any] = await client.info()
    except (AuthenticationError, NoPermissionError):
        raise StartupError(
            "Redis does not let this server in: correct the user and the password in REDIS_URL "
            "(`redis://user:password@host:6379/0`), or what that user may do."
        ) from None
    except InvalidResponse:
        raise StartupError("What answers at REDIS_URL is no Redis: correct its host and port.") from None
    except (RedisError, OSError) as error:
        if "DB index" in str(error):
            raise StartupError("REDIS_URL names a database that this Redis does not have: use `/0`.") from None
        raise StoreFailed(type(error).__name__) from None  # its text may repeat the address, which may have a password
    if info.get("redis_mode") == "cluster":
        raise StartupError(
            "REDIS_URL names a node of a Redis cluster, which cannot change the jobs in one transaction: name a Redis "
            "that is none."
        )
    numbers = tuple(int(number) for number in re.findall(r"\d+", _version(info))[:2])
    if numbers and numbers < OLDEST:
        raise StartupError(f"Redis {_version(info)} is too old: vecmill needs 6.2 or newer, or Valkey.")
    await _check_format(client)
    return info


async def _check_format(client: AsyncRedis) -> None:
    """Raises StartupError where a newer version has written what is there; StoreFailed."""
    try:
        async with asyncio.timeout(JOBS_TIMEOUT_SECONDS):
            stored: Any = await client.get(FORMAT_KEY)
    except (RedisError, OSError) as error:
        raise StoreFailed(type(error).__name__) from None
    try:
        _refuse_newer(stored)
    except NewerFormat as error:
        raise StartupError(str(error)) from None


def _version(info: Mapping[str, Any]) -> str:
    return str(info.get("redis_version", ""))
