"""A GPU's memory, put together from what NVML, torch and the kernel know; each of them is wrong somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.meminfo import unified_available
from vecmill.hardware.memory import MEGABYTE, DeviceMemory


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """MB (2^20 bytes); None is "not available". `unified`: it is the machine's memory, and so are total and available.

    `allocated` and `reserved` are torch's in this process; `this_process` and `other_processes` the driver's, which has
    CUDA's own share in it.
    """

    unified: bool | None = None
    total_mb: int | None = None
    available_mb: int | None = None
    allocated_mb: int | None = None
    reserved_mb: int | None = None
    this_process_mb: int | None = None
    other_processes_mb: int | None = None


def gpu_memory(gpu: GpuReading | None, device: DeviceMemory | None, info: Mapping[str, int], pid: int) -> GpuMemory:
    """`info` is the kernel's (`meminfo`), `pid` this process."""
    gpu = gpu or GpuReading()
    unified = device.unified if device else gpu.unified
    total, available = _totals(gpu, device, info, unified is True)
    return GpuMemory(
        unified=unified,
        total_mb=total,
        available_mb=available,
        allocated_mb=device.allocated_mb if device else None,
        reserved_mb=device.reserved_mb if device else None,
        this_process_mb=gpu.memory_of(pid),
        other_processes_mb=gpu.memory_of_others(pid),
    )


def _totals(
    gpu: GpuReading, device: DeviceMemory | None, info: Mapping[str, int], unified: bool
) -> tuple[int | None, int | None]:
    if unified:
        return _megabytes(info.get("MemTotal")), _megabytes(unified_available(info))
    if device:
        return device.total_mb, device.reported_free_mb
    return gpu.memory_total_mb, gpu.memory_free_mb


def _megabytes(bytes_: int | None) -> int | None:
    return None if bytes_ is None else bytes_ // MEGABYTE
