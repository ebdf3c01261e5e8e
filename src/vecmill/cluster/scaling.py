"""How many replicas a placement needs, by the tokens that wait for its models."""

from __future__ import annotations

from math import ceil
from typing import Any

from ray.serve.config import AutoscalingContext

QUEUED_SECONDS, BUSY = "queued_seconds", "busy"
"""What replicas record: how long they will work on what waits, and whether their device works (0 or 1)."""
BUSY_SHARE = 0.8
"""Of the time, up to which a device may work before more are needed: above it searches begin to wait."""


class QueuedTokens:
    """Enough replicas to have done what waits within `seconds`, and to be at work for `BUSY_SHARE` of the time at most.

    Tokens that wait count by the time that the model of each takes for them, so that those of a large model weigh more.
    Ray applies the bounds and the delays of its own.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas wanted."""
        recorded = context.aggregated_metrics or {}
        queued, busy = (sum(recorded.get(name, {}).values()) for name in (QUEUED_SECONDS, BUSY))
        wanted = max(ceil(queued / self._seconds), ceil(busy / BUSY_SHARE))
        # Who waits for a first replica, or is served by the last, is not in what they record.
        return max(wanted, int(context.total_num_requests > 0)), {}
