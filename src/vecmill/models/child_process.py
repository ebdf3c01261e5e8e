"""What a process of its own gets, and may take, that runs what a checkpoint brings: a chat template or a pickle."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


def inherited_environment() -> dict[str, str]:
    """The variables that Python needs to start; none that holds a token."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def limit_this_process(
    *, memory_bytes: int, cpu_seconds: int, file_bytes: int | None = None, open_files: int | None = None
) -> None:
    """Bound what this process may take from now on, as far as the system can; a core dump is never written.

    Args:
        memory_bytes: beside what it takes already.
        file_bytes: of each file that it writes; None: no bound.
    """
    with suppress(ImportError):
        import resource  # not on Windows

        limits = {
            resource.RLIMIT_CPU: cpu_seconds,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: file_bytes,
            resource.RLIMIT_NOFILE: open_files,
        }
        with suppress(OSError):  # not on macOS
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limits[resource.RLIMIT_AS] = taken + memory_bytes
        for kind, limit in limits.items():
            if limit is not None:
                resource.setrlimit(kind, (limit, limit))
