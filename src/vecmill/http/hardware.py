"""What the server says of its machine, the same in /health, /capabilities and /stats."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.gpu_memory import GpuMemory, gpu_memory
from vecmill.hardware.meminfo import meminfo
from vecmill.hardware.monitor import Look
from vecmill.http.services import Services

READINGS = (
    "name",
    "uuid",
    "driver_version",
    "cuda_version",
    "compute_capability",
    "utilization_percent",
    "temperature_c",
    "power_watts",
    "power_limit_watts",
    "sm_clock_mhz",
    "max_sm_clock_mhz",
    "performance_state",
    "clock_reasons",
)


def gpu_facts(services: Services) -> dict[str, Any] | None:
    """The GPU, also one that is not used; None without one. Fields that nobody knows are null, never zero."""
    look, memory = services.gpu(), services.device_memory()
    if look.gpu is None and memory is None:
        return None
    gpu = look.gpu or GpuReading(not_available={"all": look.reason or ""})
    return {
        **{name: getattr(gpu, name) for name in READINGS},
        "in_use": memory is not None,
        "clock": {"state": look.clock.state.value, "message": look.clock.message},
        "memory": asdict(memory_of_gpu(services)),
        "not_available": gpu.not_available,
    }


def memory_of_gpu(services: Services) -> GpuMemory:
    """The GPU's memory now."""
    return gpu_memory(services.gpu().gpu, services.device_memory(), meminfo(), os.getpid())


def warnings(look: Look) -> list[str]:
    """What is wrong with the machine though requests are served, one sentence with the cure each."""
    return [look.clock.message] if look.clock.bad else []
