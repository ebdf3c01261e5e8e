"""A batch's line as one of the requests that the routes take, and its result as what they answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vecmill.batches.endpoint import LineResult
from vecmill.core.errors import BatchFailed, DeadlineExceeded, Overloaded, Unavailable, VecmillError
from vecmill.http.error_shapes import ErrorShape
from vecmill.http.errors import error_response

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Beside the requests of people (MAX_CONCURRENT_REQUESTS).
LARGEST_SHARE = 8
TRIES = 3


async def patiently(call: Callable[[], Awaitable[T]], tries: int = TRIES) -> T:
    """Ask until the server has room.

    Raises:
        DeadlineExceeded, BatchFailed: so it was every time. Any other error of a request as it comes.
    """
    while True:
        try:
            return await call()
        except (BatchFailed, DeadlineExceeded) as error:
            tries -= 1
            if tries <= 0:
                raise
            seconds = getattr(error, "retry_after", 1)
        except (Overloaded, Unavailable) as error:
            seconds = error.retry_after
        await asyncio.sleep(seconds)


def refused_line(shape: ErrorShape, error: Exception) -> LineResult:
    """What the route would answer to an error."""
    if not isinstance(error, VecmillError):
        logger.error("unhandled error in a line of a batch", exc_info=error)
        error = VecmillError("The server failed on this request; its log says why.")
    response = error_response(shape, error)
    return LineResult(response.status_code, bytes(response.body))
