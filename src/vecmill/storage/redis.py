"""Connections to Redis, or Valkey. Needs the extra `redis`.

Source: https://redis.readthedocs.io/en/stable/connections.html
"""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

# Whoever waits for Redis has a client that waits too.
TIMEOUT_SECONDS = 1.0
MAX_CONNECTIONS = 32


def connect(url: str) -> Redis:
    """A client that connects when it is first used, and again after Redis was away. Answers are bytes.

    Raises:
        ValueError, TypeError: the address has what the library does not know.
    """
    client = Redis.from_url(
        url,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        # Once, for a connection that Redis has closed meanwhile.
        retry=Retry(NoBackoff(), 1),
        max_connections=MAX_CONNECTIONS,
    )
    # Not connected yet; it would raise at each use otherwise.
    client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    return client
