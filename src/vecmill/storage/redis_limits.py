"""What each API key has in progress at all servers together, in Redis. Needs the extra `redis`.

A hash for each key that has limits and something in progress: server to its report. Neither a key nor its name is in
it: both are hashed. A script counts and adds in one step, so that two servers cannot both take the last place.

Source: https://redis.io/docs/latest/develop/programmability/eval-intro/ (scripts are atomic)
"""

from __future__ import annotations

import asyncio
import secrets
from hashlib import sha256

from redis.exceptions import RedisError

from vecmill.core.protocols import StoreFailed, UseSeen
from vecmill.core.types import KeyLimits
from vecmill.storage.redis_connection import connect

IN_USE = "vecmill:use:"
TIMEOUT_SECONDS = 1.0  # a request waits: where it takes longer, the limit holds for this server alone
EXPIRES_MS = 15_000  # of a server that does not report any more

# KEYS[1]: the hash. ARGV: server, its requests, its tokens, tokens of the request that it asks for (-1: of none), the
# limit on requests, that on tokens (-1: no limit), milliseconds until the report expires.
EXCHANGE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local requests, tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
local others = redis.call('HGETALL', KEYS[1])
for i = 1, #others, 2 do
  if others[i] ~= ARGV[1] then
    local r, t, expires = string.match(others[i + 1], '^(%d+) (%d+) (%d+)$')
    if r and tonumber(expires) > now then
      requests, tokens = requests + r, tokens + t
    else
      redis.call('HDEL', KEYS[1], others[i])
    end
  end
end
local more, most_requests, most_tokens = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local own_requests, own_tokens, granted = tonumber(ARGV[2]), tonumber(ARGV[3]), 0
if more >= 0 and (most_requests < 0 or requests < most_requests)
    and (most_tokens < 0 or tokens == 0 or tokens + more <= most_tokens) then
  granted, own_requests, own_tokens = 1, own_requests + 1, own_tokens + more
end
if own_requests > 0 then
  local report = string.format('%d %d %d', own_requests, own_tokens, now + ARGV[7])
  redis.call('HSET', KEYS[1], ARGV[1], report)
  redis.call('PEXPIRE', KEYS[1], ARGV[7])
else
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return {granted, requests, tokens}
"""


class RedisUse:
    """All servers at one Redis count the same. Every report expires."""

    def __init__(self, url: str) -> None:
        """Connects when it is first used, and reconnects after Redis was away.

        Raises:
            ValueError, TypeError: the client library does not know an option or a part of the address.
        """
        self._redis = connect(url)
        self._exchange = self._redis.register_script(EXCHANGE)
        self._server = secrets.token_hex(8)  # of this process: one that follows it has nothing in progress yet

    async def exchange(self, owner: str, requests: int, tokens: int, more: int | None, limits: KeyLimits) -> UseSeen:
        """Report what this server has in progress of a key; with `more`, ask for a request of so many tokens beside it.

        Raises:
            StoreFailed: Redis does not answer; whether it has counted is not known.
        """
        asked = [-1 if number is None else number for number in (more, limits.requests, limits.tokens)]
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                granted, all_requests, all_tokens = await self._exchange(
                    keys=[IN_USE + sha256(owner.encode()).hexdigest()[:32]],
                    args=[self._server, requests, tokens, *asked, EXPIRES_MS],
                )
        except (RedisError, OSError) as error:
            raise StoreFailed(type(error).__name__) from None  # its text may repeat the address, with a password
        return UseSeen(bool(granted), int(all_requests), int(all_tokens))

    async def close(self) -> None:
        """Close the connections. Raises nothing."""
        await self._redis.aclose()
