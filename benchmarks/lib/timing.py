"""Times several ways to do the same work in turns, beside the limits of the machine."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from benchmarks.lib.figures import in_turns, significant, spread
from benchmarks.lib.host import watched
from torch import Tensor

LIMITS = ("matmul", "copy")


@dataclass(frozen=True)
class TimedSide:
    """One of the ways to do the work."""

    run: Callable[[], Tensor]
    operations: float
    """Floating-point operations of one call, a multiply-add counted as two."""
    weight_bytes: float
    """Bytes of weights that one call has to read."""


@dataclass(frozen=True)
class Machine:
    """Where it runs, and for how long."""

    device: torch.device
    rounds: int
    seconds: float
    """Of each side in each round, at least one call."""
    matmul_size: int
    copy_bytes: int
    advance: Callable[[int], None] = field(default=lambda done: None, compare=False)
    """Called with 1 after each side of each round."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each side and of the limits, one entry for each round."""

    seconds: Mapping[str, Sequence[float]]
    other_cores: float
    """Cores that other programs used meanwhile, on average."""


@cache
def limits(machine: Machine, dtype: torch.dtype) -> dict[str, TimedSide]:
    """A large square matmul, and a copy of more than fits a cache: both ways of its traffic count."""
    size = machine.matmul_size
    # Random values: a GPU draws less power, and so runs faster, on constants.
    first, second = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
    product = torch.empty_like(first)
    source = torch.ones(machine.copy_bytes, dtype=torch.uint8, device=machine.device)
    copied = torch.empty_like(source)
    return {
        "matmul": TimedSide(lambda: torch.matmul(first, second, out=product), 2.0 * size**3, 0),
        "copy": TimedSide(lambda: copied.copy_(source), 0, 2.0 * machine.copy_bytes),
    }


def alternate(machine: Machine, dtype: torch.dtype, sides: Mapping[str, TimedSide]) -> Rounds:
    """Time every side and the limits of this dtype in each round, the order turned round from one to the next."""
    everything = {**sides, **limits(machine, dtype)}
    for side in everything.values():  # the first call prepares kernels and memory
        side.run()
    calls = {name: max(1, math.ceil(machine.seconds / _seconds(machine, side, 1))) for name, side in everything.items()}
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    with watched() as contention:
        for name in in_turns(list(everything), machine.rounds):
            seconds[name].append(_seconds(machine, everything[name], calls[name]))
            machine.advance(1)
    return Rounds(seconds, contention.other_cores)


def _seconds(machine: Machine, side: TimedSide, calls: int) -> float:
    machine.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        side.run()
    machine.synchronize()
    return (time.perf_counter() - started) / calls


def report(
    machine: Machine, dtype: torch.dtype, sides: Mapping[str, TimedSide], rounds: Rounds, items: int
) -> dict[str, Any]:
    """What JSON gets: rates of `items` per call, how near the limits, and the first side against each other one."""
    seconds, measured = rounds.seconds, limits(machine, dtype)
    rates = [measured["matmul"].operations / each for each in seconds["matmul"]]
    traffic = [measured["copy"].weight_bytes / each for each in seconds["copy"]]
    ours, *others = sides
    return {
        "sides": {
            name: {
                "per_s": spread([items / each for each in seconds[name]]),
                "of_matmul": spread(
                    [side.operations / rate / each for rate, each in zip(rates, seconds[name], strict=True)]
                ),
                "of_limit": spread(
                    [
                        max(side.operations / rate, side.weight_bytes / moved) / each
                        for rate, moved, each in zip(rates, traffic, seconds[name], strict=True)
                    ]
                ),
            }
            for name, side in sides.items()
        },
        "ratio": {
            name: spread([theirs / mine for mine, theirs in zip(seconds[ours], seconds[name], strict=True)])
            for name in others
        },
        "limits": {
            "matmul_tflops": spread([rate / 1e12 for rate in rates]),
            "copy_gb_per_s": spread([moved / 1e9 for moved in traffic]),
        },
        "other_cores": significant(rounds.other_cores),
    }
