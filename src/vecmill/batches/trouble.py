"""What the disk's errors mean to a client."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vecmill.batches.threads import in_thread
from vecmill.core.errors import InsufficientStorage, StateUnavailable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
P = ParamSpec("P")
T = TypeVar("T")


async def on_disk(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread, its errors of the disk turned into errors for a client.

    Raises:
        InsufficientStorage: the disk is full. StateUnavailable: any other.
    """
    try:
        return await in_thread(function, *args, **kwargs)
    except OSError as error:
        if error.errno in FULL:
            raise InsufficientStorage from error
        reason = error.strerror or type(error).__name__
        raise StateUnavailable(
            f"503: STATE_DIR cannot be used ({reason}), so files and batches are temporarily unavailable; embedding is "
            f"not."
        ) from error
