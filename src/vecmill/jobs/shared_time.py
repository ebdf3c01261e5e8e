"""The time of servers that share their jobs: that of the store, but never back and never in a jump."""

from __future__ import annotations

from collections.abc import Callable

from vecmill.jobs.ledger import Totals

# Seconds between writes of the time, at the most, even if nothing else happens.
HEARTBEAT_SECONDS = 5.0
# What the store's clock may gain on this machine's between two looks: drift, and time on the way.
SLACK_SECONDS = 2.0


class SharedTime:
    """Goes on from the last written time by what the store's clock has moved since, within what can be true."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._seen: tuple[float, float] | None = None  # the time, and the monotonic time when it was that

    def __call__(self) -> float:
        """As far as known without asking."""
        if self._seen is None:
            return 0.0
        time, at = self._seen
        return time + self._monotonic() - at

    def after(self, written: Totals, server_time: float) -> float:
        """The time when the store's clock shows `server_time`."""
        if not written.token:
            return max(server_time, written.time)
        now = written.time + max(0.0, server_time - written.server_time)
        if self._seen is None:
            return now
        return max(written.time, min(now, self() + SLACK_SECONDS))

    def seen(self, now: float) -> None:
        """The time is this."""
        self._seen = (now, self._monotonic())

    def is_late(self, written: Totals, now: float, server_time: float) -> bool:
        """Whether the time must be written: it is due, or the store's clock was set."""
        moved = server_time - written.server_time
        return now - written.time > HEARTBEAT_SECONDS or moved < 0 or moved > now - written.time + 1e-3
