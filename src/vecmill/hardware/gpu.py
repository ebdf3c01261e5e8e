"""One look at a GPU: what NVML says of it, where it says anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# In the names of NVIDIA's chips that have no memory of their own.
UNIFIED = ("GB10", "Thor", "Orin")


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on the GPU. `memory_mb` is None where the driver does not tell."""

    pid: int
    memory_mb: int | None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What NVML said. None is "not available", never zero; `not_available` says why, field by field.

    Memory in MB (2^20 bytes), clocks in MHz, power in watts, temperature in degrees Celsius, utilization in percent of
    the last moment in which a kernel ran. `memory_*_mb` are NVML's own: a GB10 has none, its memory is the machine's.
    """

    name: str | None = None
    uuid: str | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    compute_capability: str | None = None
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    performance_state: str | None = None
    clock_reasons: tuple[str, ...] | None = None
    """Why the clocks are where they are, in NVML's words: `gpu_idle`, `sw_power_cap`, `hw_thermal_slowdown`, ..."""
    memory_total_mb: int | None = None
    memory_used_mb: int | None = None
    memory_free_mb: int | None = None
    processes: tuple[GpuProcess, ...] | None = None
    not_available: Mapping[str, str] | None = None

    @property
    def unified(self) -> bool | None:
        """Whether its memory is the machine's, as far as NVML lets it be told: torch knows better."""
        if any(name in (self.name or "") for name in UNIFIED):
            return True
        return None if self.memory_total_mb is None else False

    def memory_of(self, pid: int) -> int | None:
        """MB that one process has on the GPU; None where the driver does not tell (in a container: of no process)."""
        return next((process.memory_mb for process in self.processes or () if process.pid == pid), None)

    def memory_of_others(self, pid: int) -> int | None:
        """MB that all processes but one have on the GPU; None where not all of them are known."""
        if self.processes is None:
            return None
        theirs = [process.memory_mb for process in self.processes if process.pid != pid]
        return None if None in theirs else sum(memory for memory in theirs if memory is not None)


def nvidia_gpu_present(root: Path = Path("/")) -> bool:
    """True where the NVIDIA kernel driver has a GPU (Linux). `root` is the file system to look at.

    Found without torch: the point is to notice when torch cannot see it.
    """
    return any((root / "proc/driver/nvidia/gpus").glob("*")) or any((root / "dev").glob("nvidia[0-9]*"))
