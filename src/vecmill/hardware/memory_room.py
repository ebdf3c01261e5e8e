"""Whether models find room: the memory of the device that would serve them, and what a model of a size takes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from vecmill.hardware.gpu import GpuMemory
from vecmill.hardware.memory import CGROUP, GIGABYTE, MEGABYTE, OWN_CGROUP, ControlGroups, host_memory, memory_floor

# Beside the weights: libraries and CUDA's context, the largest forward pass, tokenizers, answers.
GPU_ALLOWANCE, CPU_ALLOWANCE = 4 * GIGABYTE, 1 * GIGABYTE


class Fit(StrEnum):
    """Whether a model finds room."""

    FITS = "fits"
    """Now."""
    TIGHT = "tight"
    """Only once other programs give memory back, or only in the smaller of the types that it may be loaded in."""
    DOES_NOT_FIT = "does not fit"
    """Not even on an idle machine."""


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Bytes. `floor` stays free; `most` is what the process may take."""

    total: int
    available: int
    floor: int
    most: int
    unified: bool
    of_gpu: bool

    def fit(self, smallest: int, largest: int) -> Fit:
        """Of a model that needs, all included, one of two numbers of bytes: it is not known which."""
        if smallest > min(self.most, self.total - self.floor):
            return Fit.DOES_NOT_FIT
        return Fit.FITS if largest <= min(self.most, self.available - self.floor) else Fit.TIGHT

    def in_control_groups(self) -> MemoryRoom:
        """The same within the limits of this process's control groups, which do not count what a GPU's driver has."""
        groups = ControlGroups(CGROUP, OWN_CGROUP)
        limit, left = groups.limit(), groups.left()
        if self.of_gpu or limit is None or left is None or limit >= self.total:
            return self
        share = limit / self.total
        return replace(
            self,
            total=limit,
            available=min(self.available, left),
            floor=int(share * self.floor),
            most=int(share * self.most),
        )


def memory_room(gpu: GpuMemory | None, floor_gb: float | None, fraction: float) -> MemoryRoom:
    """The GPU's memory, the machine's where there is none or its driver does not tell.

    Args:
        floor_gb: MEMORY_FLOOR_GB; None is its default.
        fraction: MEMORY_FRACTION.
    """
    machine = host_memory()
    total_mb, available_mb, of_gpu = machine.total_mb, machine.available_mb, False
    if gpu is not None and gpu.total_mb is not None and gpu.available_mb is not None:
        total_mb, available_mb, of_gpu = gpu.total_mb, gpu.available_mb, True
    total = total_mb * MEGABYTE
    unified = of_gpu and gpu is not None and gpu.unified is True
    # A card's own memory has no floor: nothing else lives from it.
    floor = 0 if of_gpu and not unified else int(memory_floor(total, floor_gb))
    return MemoryRoom(total, available_mb * MEGABYTE, floor, int(fraction * total), unified, of_gpu)


def allowance(*, on_gpu: bool) -> int:
    """Bytes that are needed beside the weights."""
    return GPU_ALLOWANCE if on_gpu else CPU_ALLOWANCE
