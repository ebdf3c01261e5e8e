"""What the disk's errors mean to a client."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vecmill.core.errors import InsufficientStorage, StateUnavailable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def explained() -> Iterator[None]:
    """Errors of the disk in the block as errors for a client.

    Raises:
        InsufficientStorage: the disk is full. StateUnavailable: any other.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise InsufficientStorage from error
        raise StateUnavailable(
            f"503: STATE_DIR cannot be used ({error.strerror or error}), so files and batches are temporarily "
            f"unavailable; embedding is not."
        ) from error
