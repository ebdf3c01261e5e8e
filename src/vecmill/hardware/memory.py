"""Memory of the machine, the process and the device, in MB (2^20 bytes)."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a GPU holds. `free_mb` is None where CPU and GPU share one memory: ask `host_memory` there."""

    total_mb: int
    allocated_mb: int
    reserved_mb: int
    free_mb: int | None


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The machine's memory and this process's share."""

    total_mb: int
    available_mb: int
    process_mb: int


def host_memory() -> HostMemory:
    """Read the memory now."""
    machine = psutil.virtual_memory()
    return HostMemory(
        total_mb=machine.total // MEGABYTE,
        available_mb=machine.available // MEGABYTE,
        process_mb=psutil.Process().memory_info().rss // MEGABYTE,
    )
