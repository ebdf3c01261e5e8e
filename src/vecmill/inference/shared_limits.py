"""The limits of API keys, over all servers that share a Redis.

Each server reports what it has in progress of a key, as a whole and not as a difference: a report that is lost is
repaired by the next. The report of a server that was killed expires. While the store does not answer, each server
keeps to the limits by itself.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic

from vecmill.core.protocols import SharedUse, StoreFailed, UseSeen
from vecmill.core.types import KeyLimits

logger = logging.getLogger(__name__)

MOST_WAITING = 4096  # of one key
# Until a request that was refused by the limit is tried again, as another server may be done: longer each time.
AGAIN_SECONDS, LONGEST_AGAIN_SECONDS = 0.01, 0.2
RETRY_SECONDS = 5.0  # without the store after it has failed
CLOSE_SECONDS = 2.0
RENEW_SECONDS = 4.0  # a report expires after almost four times this


@dataclass(eq=False, slots=True)
class _Key:
    """What this server has in progress of one key."""

    requests: int = 0
    tokens: int = 0
    reported: bool = True
    """Whether the store knows of the last change."""
    callers: int = 0
    """Who waits for the store or for room; the entry stays for as long."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One exchange with the store at a time, in the order in which requests came."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class SharedLimits:
    """Belongs to the event loop's thread. Costs nothing for keys without limits."""

    def __init__(self, store: SharedUse) -> None:
        self._store = store
        self._keys: dict[str | None, _Key] = {}
        self._failed_at = -inf
        self._failing = False
        self._wake = asyncio.Event()
        self._closing = False
        self._renewal = asyncio.create_task(self._report_again_and_again(), name="limits of keys")

    async def take(self, owner: str | None, tokens: int, limits: KeyLimits, wait_seconds: float) -> str | None:
        """Count one more request of a key; why it is refused where the limit stays reached for `wait_seconds`."""
        key = self._keys.setdefault(owner, _Key())
        refusal = "requests of this API key wait for others of it already"
        if key.callers >= MOST_WAITING:
            return refusal
        key.callers += 1
        try:
            # Without time to wait each still has one exchange, in turn.
            async with asyncio.timeout(wait_seconds or None), key.turn:
                pause = AGAIN_SECONDS
                while (refused := await self._exchange(owner, key, tokens, limits)) is not None:
                    refusal = refused
                    if wait_seconds <= 0:
                        return refusal
                    key.freed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await key.freed.wait()
                    pause = min(2 * pause, LONGEST_AGAIN_SECONDS)
        except TimeoutError:
            return refusal
        finally:
            key.callers -= 1
            self._wake.set()
        return None

    def change(self, owner: str | None, requests: int, tokens: int) -> None:
        """Correct what was taken: its tokens were counted, or (-1 request) it is done."""
        key = self._keys[owner]
        key.requests += requests
        key.tokens += tokens
        key.reported = False
        key.freed.set()
        self._wake.set()

    async def close(self) -> None:
        """Report for the last time, that nothing is in progress; a report that cannot be made expires by itself."""
        self._closing = True
        self._wake.set()
        await asyncio.wait({self._renewal}, timeout=CLOSE_SECONDS)
        self._renewal.cancel()
        await asyncio.gather(self._renewal, return_exceptions=True)
        await self._store.close()

    async def _exchange(self, owner: str | None, key: _Key, tokens: int, limits: KeyLimits) -> str | None:
        """Report, and ask for one request more; None: it is counted."""
        seen, before = None, (key.requests, key.tokens)
        if not self._left_alone():
            key.reported = False  # until the answer is there, nobody knows whether it was counted
            seen = await self._tried(owner, key, tokens, limits)
        key.reported = seen is not None and before == (key.requests, key.tokens)
        if seen is not None and not seen.granted:
            if limits.requests is not None and seen.requests >= limits.requests:
                return f"{seen.requests} requests of this API key are in progress, which is its limit (`requests`)"
            return f"{seen.tokens} tokens of this API key are in progress, its limit is {limits.tokens} (`tokens`)"
        key.requests += 1
        key.tokens += tokens
        return None

    async def _tried(self, owner: str | None, key: _Key, tokens: int | None, limits: KeyLimits) -> UseSeen | None:
        try:
            seen = await self._store.exchange(owner or "", key.requests, key.tokens, tokens, limits)
        except StoreFailed as error:
            self._failed_at = monotonic()
            if not self._failing:
                logger.error("the limits of keys hold for each server by itself until Redis can be used (%s)", error)
            self._failing = True
            return None
        if self._failing:
            logger.warning("the limits of keys hold over all servers again")
        self._failing = False
        return seen

    def _left_alone(self) -> bool:
        return monotonic() - self._failed_at < RETRY_SECONDS

    async def _report_again_and_again(self) -> None:
        renewed_at = monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            due = monotonic() - renewed_at >= RENEW_SECONDS
            if due:
                renewed_at = monotonic()
            for owner, key in list(self._keys.items()):
                await self._report(owner, key, due=due)
            if self._closing:
                return
            if self._left_alone():
                await asyncio.sleep(self._failed_at + RETRY_SECONDS - monotonic())
                self._wake.set()

    async def _report(self, owner: str | None, key: _Key, *, due: bool) -> None:
        # Who has the turn reports for all.
        if not key.turn.locked() and (due or not key.reported) and not self._left_alone():
            async with key.turn:
                before = key.requests, key.tokens
                seen = await self._tried(owner, key, None, KeyLimits())
                key.reported = seen is not None and before == (key.requests, key.tokens)
        if not key.callers and not key.requests and key.reported:
            self._keys.pop(owner, None)
