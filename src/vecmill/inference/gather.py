"""Waiting for all parts of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vecmill.core.errors import DoesNotFit, NonFiniteEmbedding
from vecmill.scheduler.lines import SequenceResult


async def all_or_first_error(
    futures: Sequence[asyncio.Future[SequenceResult]], name: Callable[[int], str]
) -> list[SequenceResult]:
    """Wait for every future. On the first error, or when the caller is cancelled, the rest is abandoned.

    Raises:
        NonFiniteEmbedding, DoesNotFit: with the input's `name`. Any other error as it was set.
    """
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        for index, future in enumerate(futures):
            error = future.exception() if future.done() else None
            if isinstance(error, NonFiniteEmbedding | DoesNotFit):
                raise type(error)(f"`{name(index)}`: {error.message}", param=name(index))
        failed = next((future for future in futures if future.done() and future.exception()), None)
        return [future.result() for future in ([failed] if failed else futures)]
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()  # seen: asyncio would log an error that nobody looked at
