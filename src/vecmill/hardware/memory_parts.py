"""A machine's memory and a GPU's, each as parts that sum up to all of it: for a bar that shows where it is.

On a GPU that shares the machine's memory (GB10) there is one memory: what this process holds of it is what it has as a
process and what the GPU's driver holds for it, which the kernel counts for no process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from vecmill.hardware.gpu import GpuMemory
from vecmill.hardware.memory import CGROUP, MEGABYTE, OWN_CGROUP, PROC, ControlGroups, meminfo, memory_floor


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes; the first is the sum of the others but `floor`.

    `page_cache`: files that the kernel keeps while nobody needs the room. `floor`: what the server leaves free, the
    page cache included, by MEMORY_FLOOR_GB.
    """

    total: int
    ours: int
    others: int
    page_cache: int
    free: int
    floor: int


@dataclass(frozen=True, slots=True)
class GpuMemoryParts:
    """Bytes of a GPU with a memory of its own; None is "not available", and then nothing sums up."""

    total: int | None
    ours: int | None
    others: int | None
    free: int | None


@dataclass(frozen=True, slots=True)
class _Account:
    """How much there is, how much of it nobody has, and how much only caches files."""

    total: int
    free: int
    page_cache: int

    @property
    def available(self) -> int:
        return self.free + self.page_cache


class MemoryMeter:
    """Reads the parts. For one thread."""

    def __init__(
        self, floor_gb: float | None, proc: Path = PROC, cgroup: Path = CGROUP, own_cgroup: Path = OWN_CGROUP
    ) -> None:
        self._floor_gb = floor_gb
        self._proc = proc
        self._groups = ControlGroups(cgroup, own_cgroup)
        self._process = psutil.Process()

    def machine(self, gpu: GpuMemory) -> MemoryParts:
        """The machine's memory; or a control group's, where that leaves the process less than the machine has.

        `gpu`: of the GPU that is used.
        """
        ours, mapped = self._ours()
        account = _account(meminfo(self._proc))
        if gpu.unified:
            ours += MEGABYTE * (gpu.this_process_mb or gpu.reserved_mb or 0)  # which no control group counts
        elif (group := self._group()) is not None and group.available < account.available:
            account = group
        # A file that this process has mapped, as its weights, is in the page cache and counted as the process's.
        page_cache = max(0, account.page_cache - mapped)
        used = max(0, account.total - account.free - page_cache)
        ours = min(ours, used)
        floor = int(memory_floor(account.total, self._floor_gb))
        return MemoryParts(account.total, ours, used - ours, page_cache, account.free, floor)

    def _ours(self) -> tuple[int, int]:
        """Bytes of this process, and how many of them are mapped files."""
        memory = self._process.memory_info()
        # `shared` is mapped files and shared memory, on Linux alone.
        return int(memory.rss), int(getattr(memory, "shared", 0))

    def _group(self) -> _Account | None:
        group = self._groups.strictest()
        if group is None:
            return None
        return _Account(group.limit, max(0, group.limit - group.used), min(group.inactive, group.limit))


def _account(info: Mapping[str, int]) -> _Account:
    """The machine's, by the kernel's own counts where it shows them."""
    if "MemTotal" not in info:
        memory = psutil.virtual_memory()
        return _Account(int(memory.total), int(memory.free), max(0, int(memory.available - memory.free)))
    cached = sum(info.get(name, 0) for name in ("Cached", "Buffers", "SReclaimable")) - info.get("Shmem", 0)
    return _Account(info["MemTotal"], info.get("MemFree", 0), max(0, cached))


def gpu_parts(gpu: GpuMemory, *, in_use: bool) -> GpuMemoryParts:
    """A GPU's own memory. `in_use`: by this process."""
    ours = gpu.this_process_mb if gpu.this_process_mb is not None else gpu.reserved_mb
    if ours is None and not in_use:
        ours = 0
    others = None
    if None not in (gpu.total_mb, gpu.available_mb, ours):
        assert gpu.total_mb is not None and gpu.available_mb is not None and ours is not None  # noqa: PT018
        others = max(0, gpu.total_mb - gpu.available_mb - ours)
    return GpuMemoryParts(_bytes(gpu.total_mb), _bytes(ours), _bytes(others), _bytes(gpu.available_mb))


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * MEGABYTE
