"""Whether other programs took the processor during a measurement."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


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
