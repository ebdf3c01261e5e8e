"""The machine of a measurement: what it is, what other programs took of it meanwhile, and what it keeps of files."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Contention:
    """Cores that processes other than this one and all that it started used, on average over the block."""

    other_cores: float = 0.0


@contextmanager
def watched() -> Iterator[Contention]:
    """Fill in the contention when the block ends."""
    contention = Contention()
    before, started = _other_cpu_seconds(), time.perf_counter()
    yield contention
    elapsed = time.perf_counter() - started
    contention.other_cores = max(0.0, (_other_cpu_seconds() - before) / elapsed)


def _other_cpu_seconds() -> float:
    total = psutil.cpu_times()
    own = psutil.Process()
    return total.user + total.nice + total.system - sum(map(_cpu_seconds, (own, *own.children(recursive=True))))


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):  # it ended a moment ago: its parent has its time
        times = process.cpu_times()
        # A server's workers may end during the block; their time moves to the parent that waits for them.
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


def forget(path: Path) -> None:
    """Drop a file from the system's page cache, where it can be asked to, so that it is read from the disk again."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def describe_host() -> dict[str, Any]:
    """Processor, usable cores, GPU if any, versions, and the commit measured."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def host_kind(host: dict[str, Any]) -> str:
    """The machine as a part of file names: its GPU, or else its processor and cores."""
    name = host["gpu"] or f"{host['cpu']} {host['cores']}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checked-out commit, with "-dirty" if files differ from it; None outside a repository."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return f"{head}-dirty" if _git("status", "--porcelain") else head


def _git(*arguments: str) -> str | None:
    # --no-optional-locks: a measurement must not touch the repository, not even its index.
    command = ["git", "-C", str(REPOSITORY), "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
