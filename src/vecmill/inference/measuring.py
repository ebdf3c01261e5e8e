"""When the device is measured again: once nobody has used it for a moment, and the machine does little else.

What a start measures is a first look, or of an earlier start, and other programs may have disturbed it. Knows nothing
of how it is measured: it is handed the functions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import psutil

from vecmill.core.errors import VecmillError

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2.0  # without a forward pass, before it is measured
BUSY_PERCENT = 30.0  # of all cores, from which on the machine is taken to do something else
LONGEST_PAUSE = 30.0  # seconds, between two looks at a machine that is always busy


async def measure_when_quiet(
    due: Callable[[], Sequence[str]],
    passes: Callable[[], int],
    is_busy: Callable[[], bool],
    measure: Callable[[str], Awaitable[bool]],
) -> None:
    """Measure every model that is due, each in a quiet moment; again and again until none is.

    Args:
        due: keys of the models to be measured.
        passes: how many forward passes there have been.
        is_busy: whether one runs or somebody waits.
        measure: measures a model; False where somebody came in between.
    """
    pause = QUIET_SECONDS
    while keys := due():
        before = passes()
        psutil.cpu_percent()  # counts from here on
        await asyncio.sleep(pause)
        if passes() != before or is_busy():
            pause = QUIET_SECONDS
        elif psutil.cpu_percent() > BUSY_PERCENT:
            pause = min(LONGEST_PAUSE, 2 * pause)
        elif not await _measured(keys[0], measure):
            pause = QUIET_SECONDS


async def _measured(key: str, measure: Callable[[str], Awaitable[bool]]) -> bool:
    try:
        return await measure(key)
    except VecmillError as error:  # the device has failed, or the server stops
        logger.debug("%s is not measured again: %s", key, error.message)
        return False
