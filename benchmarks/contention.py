"""Whether other programs took the processor during a measurement."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


@dataclass
class Contention:
    """Cores that processes other than this one and the measured one used, on average over the block."""

    other_cores: float = 0.0


@contextmanager
def watched(measured_pid: int) -> Iterator[Contention]:
    """Fill in the contention when the block ends."""
    contention = Contention()
    ours = [psutil.Process(measured_pid), psutil.Process(os.getpid())]
    before, started = _other_cpu_seconds(ours), time.perf_counter()
    yield contention
    elapsed = time.perf_counter() - started
    contention.other_cores = max(0.0, (_other_cpu_seconds(ours) - before) / elapsed)


def _other_cpu_seconds(ours: list[psutil.Process]) -> float:
    total = psutil.cpu_times()
    own = [process.cpu_times() for process in ours]
    return total.user + total.nice + total.system - sum(times.user + times.system for times in own)
