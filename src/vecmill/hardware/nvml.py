"""NVML through nvidia-ml-py, every field by itself: one that a driver lacks costs nothing but that field.

Source: https://docs.nvidia.com/deploy/nvml-api; a GB10 has neither memory, fan nor power limit there
(https://docs.nvidia.com/dgx/dgx-spark/known-issues.html).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pynvml

from vecmill.hardware.gpu import GpuProcess, GpuReading
from vecmill.hardware.memory import MEGABYTE

Ask = Callable[[Any], Any]

CLOCK_REASONS = {
    pynvml.nvmlClocksEventReasonGpuIdle: "gpu_idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "applications_clocks_setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}


class NvmlUnavailable(Exception):
    """NVML cannot be used here; the message says why."""


class Nvml:
    """NVML, opened. Not to be used by two threads at a time."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            NvmlUnavailable: there is no NVIDIA driver, or it does not answer.
        """
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(_reason(error)) from None

    def close(self) -> None:
        """Let go of it."""
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:  # the driver has gone already
            return

    def count(self) -> int:
        """GPUs that the driver has."""
        try:
            return int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(_reason(error)) from None

    def read(self, uuid: str | None = None) -> GpuReading:
        """Look at the GPU with this UUID (`GPU-...`), or at the first.

        Raises:
            NvmlUnavailable: there is no such GPU.
        """
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(_reason(error)) from None
        values: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name, ask in FIELDS.items():
            try:
                values[name] = ask(handle)
            except pynvml.NVMLError as error:
                missing[name] = _reason(error)
            else:
                if values[name] is None:
                    missing[name] = "the driver gives no number"
        return GpuReading(**values, not_available=missing)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _cuda_version(_: Any) -> str:
    version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    return f"{version // 1000}.{version % 1000 // 10}"


def _compute_capability(gpu: Any) -> str:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
    return f"{major}.{minor}"


def _clock_reasons(gpu: Any) -> tuple[str, ...]:
    active = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    return tuple(word for bit, word in CLOCK_REASONS.items() if active & bit)


def _performance_state(gpu: Any) -> str | None:
    state = pynvml.nvmlDeviceGetPerformanceState(gpu)
    return None if state == pynvml.NVML_PSTATE_UNKNOWN else f"P{state}"


def _memory(part: str) -> Ask:
    """A GB10 answers NOT_SUPPORTED or, by other reports, SUCCESS with zeros."""

    def ask(gpu: Any) -> int | None:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return int(getattr(memory, part)) // MEGABYTE if memory.total else None

    return ask


def _processes(gpu: Any) -> tuple[GpuProcess, ...]:
    memory_by_pid = {process.pid: process.usedGpuMemory for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
    return tuple(
        GpuProcess(pid, None if used is None else used // MEGABYTE) for pid, used in sorted(memory_by_pid.items())
    )


def _watts(milliwatts: int) -> float | None:
    return round(milliwatts / 1000, 1) or None


FIELDS: Mapping[str, Ask] = {
    "name": lambda gpu: _text(pynvml.nvmlDeviceGetName(gpu)),
    "uuid": lambda gpu: _text(pynvml.nvmlDeviceGetUUID(gpu)),
    "driver_version": lambda _: _text(pynvml.nvmlSystemGetDriverVersion()),
    "cuda_version": _cuda_version,
    "compute_capability": _compute_capability,
    "utilization_percent": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "power_watts": lambda gpu: _watts(pynvml.nvmlDeviceGetPowerUsage(gpu)),
    "power_limit_watts": lambda gpu: _watts(pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu)),
    "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM) or None,
    "max_sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM) or None,
    "performance_state": _performance_state,
    "clock_reasons": _clock_reasons,
    "memory_total_mb": _memory("total"),
    "memory_used_mb": _memory("used"),
    "memory_free_mb": _memory("free"),
    "processes": _processes,
}


def _reason(error: Exception) -> str:
    """Why in words; NVML's own say little."""
    if isinstance(error, pynvml.NVMLError_NotSupported):
        return "this GPU does not have it"
    if isinstance(error, pynvml.NVMLError_FunctionNotFound):
        return "this driver does not know it"
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "there is no NVIDIA driver (libnvidia-ml.so.1)"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is not loaded"
    if isinstance(error, pynvml.NVMLError_NoPermission):
        return "this user may not ask for it"
    return str(error)


def reading(uuid: str | None) -> GpuReading | NvmlUnavailable:
    """One look at a GPU, or why there is none. May hang in the driver."""
    try:
        nvml = Nvml()
    except NvmlUnavailable as error:
        return error
    try:
        return nvml.read(uuid)
    except NvmlUnavailable as error:
        return error
    finally:
        nvml.close()
