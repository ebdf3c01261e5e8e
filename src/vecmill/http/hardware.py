"""What the server says of its machine, the same in /health, /capabilities and /stats."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from vecmill.hardware.gpu import GpuMemory, GpuReading, gpu_memory
from vecmill.hardware.memory import meminfo
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
HANGING = "if `nvidia-smi` hangs too, only a restart of the machine helps; `sudo dmesg` may say why."


def gpu_facts(services: Services) -> dict[str, Any] | None:
    """The GPU, also one that is not used; None without one. Fields that nobody knows are null, never zero.

    `stale`: the driver does not answer; what is said of memory was so `age_seconds` ago, and the rest is null.
    """
    look, in_use = services.gpu(), services.gpu_in_use()
    if look.gpu is None and not in_use and not look.stale:
        return None
    gpu = look.gpu or GpuReading(not_available={"all": look.reason or ""})
    return {
        **{name: getattr(gpu, name) for name in READINGS},
        "in_use": in_use,
        "stale": look.stale,
        "age_seconds": round(look.age_seconds, 1),
        "clock": {"state": look.clock.state.value, "message": look.clock.message},
        "memory": asdict(memory_of_gpu(services)),
        "not_available": gpu.not_available,
    }


def memory_of_gpu(services: Services) -> GpuMemory:
    """The GPU's memory now."""
    look = services.gpu()
    return gpu_memory(look.gpu, look.memory, meminfo(), os.getpid())


def warnings(look: Look) -> list[str]:
    """What is wrong with the machine though requests are served, one sentence with the cure each."""
    if look.stale:
        return [f"{look.reason}: {HANGING}"]
    return [look.clock.message] if look.clock.bad else []
