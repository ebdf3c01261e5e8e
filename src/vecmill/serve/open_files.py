"""How many files this process may have open (RLIMIT_NOFILE), each connection among them. Windows has no such limit."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

if sys.platform != "win32":
    import resource

RESERVED_FILES = 64
"""Descriptors that connections leave to all else: databases, files of batches, modules that are imported late."""
MOST_FILES = 1_048_576  # more helps nobody, and some systems have no end


def allow_many_files() -> None:
    """Raise the soft limit to the hard one: the soft limit is often 1,024.

    Source: https://0pointer.net/blog/file-descriptor-limits.html
    """
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def no_room_for(connection: Any) -> bool:
    """Whether a new connection's descriptor is among the last that this process may have.

    The kernel gives the lowest free number, so nearly all below it are in use. The limit may change at any time.
    """
    if connection is None or sys.platform == "win32":
        return False
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and bool(connection.fileno() >= limit - RESERVED_FILES)
