"""One look at a GPU: what NVML says of it, whether it runs as fast as it should, and what memory it has.

A GB10 whose power supply was negotiated wrongly runs at 500 to 850 MHz in P0, at full utilization, and nvidia-smi names
no reason; a healthy one runs at 2.2 to 2.4 GHz. Only taking the power away for a minute ends that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vecmill.hardware.memory import MEGABYTE, DeviceMemory, unified_available

# Compute capability from which tensor cores take bfloat16 and torch has flash kernels: Ampere's. Turing has neither.
AMPERE = (8, 0)
ADA = (8, 9)  # from here on they take float8
# In the names of NVIDIA's chips that have no memory of their own.
UNIFIED = ("GB10", "Thor", "Orin")


FLOAT8 = "fp8"
"""The value of DTYPE."""


def no_float8(device: str, capability: tuple[int, ...] | None) -> str | None:
    """Why DTYPE=fp8 is not for a device, with the cure; None where it is.

    Args:
        device: its name.
        capability: an NVIDIA card's compute capability; None: it is no such card.
    """
    if capability is not None and capability >= ADA:
        return None
    what = "no such card" if capability is None else f"of {'.'.join(map(str, capability))}"
    return (
        f"DTYPE=fp8 needs an NVIDIA card of compute capability 8.9 or newer (Ada, Hopper, Blackwell), and {device} is "
        f"{what}: set DTYPE to auto, bfloat16 or float32."
    )


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
    def capability(self) -> tuple[int, ...] | None:
        """`compute_capability` as numbers; None where it is not known."""
        return None if self.compute_capability is None else tuple(map(int, self.compute_capability.split(".")))

    @property
    def utilization_ratio(self) -> float | None:
        """`utilization_percent` as a share, 0 to 1."""
        return None if self.utilization_percent is None else self.utilization_percent / 100

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


def gpu_index(device: str) -> int:
    """The number of the GPU that a value of DEVICE names; 0 where it has none: `cuda:1` is 1, `auto` is 0."""
    return int(device.partition(":")[2] or 0)


# What the driver makes for each GPU: of a card or a GB10, and of a Jetson, whose driver is another. `nvidiactl` is no
# sign: it is there without any GPU, too.
GPU_FILES = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "dev/nvgpu/igpu[0-9]*", "dev/nvhost-gpu")


def nvidia_gpu_present(root: Path = Path("/")) -> bool:
    """True where the NVIDIA kernel driver has a GPU (Linux). `root` is the file system to look at.

    Found without torch: the point is to notice when torch cannot see it.
    """
    return any(any(root.glob(pattern)) for pattern in GPU_FILES)


GB10 = "GB10"
GB10_SLOWEST_MHZ = 1400
# Below this share of its highest clock a loaded card is held back, whatever it says.
SLOWEST_SHARE = 0.5
LOADED_PERCENT = 50
HEAT = ("hw_thermal_slowdown", "sw_thermal_slowdown")
POWER = ("hw_power_brake_slowdown", "hw_slowdown")


class ClockState(StrEnum):
    """The verdict. `unknown` where clock or load cannot be read; an idle GPU's clock says nothing."""

    OK = "ok"
    IDLE = "idle"
    THROTTLED = "throttled"
    LOCKED = "locked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ClockVerdict:
    """State, and one sentence with the cure where something is wrong."""

    state: ClockState
    message: str

    @property
    def bad(self) -> bool:
        return self.state in (ClockState.THROTTLED, ClockState.LOCKED)


def clock_verdict(gpu: GpuReading | None) -> ClockVerdict:
    """Judge one reading."""
    if gpu is None or gpu.sm_clock_mhz is None or gpu.utilization_percent is None:
        return ClockVerdict(ClockState.UNKNOWN, "clock and load are not available")
    if gpu.utilization_percent < LOADED_PERCENT:
        return ClockVerdict(ClockState.IDLE, f"{gpu.sm_clock_mhz} MHz, {gpu.utilization_percent} % busy")
    reasons = gpu.clock_reasons or ()
    if any(reason in HEAT for reason in reasons):
        return ClockVerdict(
            ClockState.THROTTLED, f"{_at(gpu)}: it is too hot. Give it air, and look at the fan and the room."
        )
    if any(reason in POWER for reason in reasons):
        return ClockVerdict(
            ClockState.THROTTLED, f"{_at(gpu)}: it gets too little power. Check the power supply and cable."
        )
    if _is_slow(gpu):
        return _locked(gpu)
    return ClockVerdict(ClockState.OK, f"{gpu.sm_clock_mhz} MHz under load")


def _is_slow(gpu: GpuReading) -> bool:
    clock = gpu.sm_clock_mhz
    if clock is None:
        return False
    if GB10 in (gpu.name or ""):
        return clock < GB10_SLOWEST_MHZ
    return gpu.max_sm_clock_mhz is not None and clock < SLOWEST_SHARE * gpu.max_sm_clock_mhz


def _locked(gpu: GpuReading) -> ClockVerdict:
    if "applications_clocks_setting" in (gpu.clock_reasons or ()):
        cure = "somebody has set its clocks; `sudo nvidia-smi -rgc` takes that back."
    elif GB10 in (gpu.name or ""):
        cure = (
            f"a healthy one runs above {GB10_SLOWEST_MHZ}. Its power supply may be in a slow state that no tool shows: "
            f"shut down, unplug the supply from the wall and from the Spark for 60 seconds, and plug it straight into "
            f"the wall."
        )
    else:
        cure = f"it can do {gpu.max_sm_clock_mhz}. See `nvidia-smi -q -d PERFORMANCE,CLOCK` for what holds it back."
    return ClockVerdict(ClockState.LOCKED, f"{_at(gpu)}: {cure}")


def _at(gpu: GpuReading) -> str:
    heat = "" if gpu.temperature_c is None else f" and {gpu.temperature_c} °C"
    return f"The GPU runs at {gpu.sm_clock_mhz} MHz under load{heat}"


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
