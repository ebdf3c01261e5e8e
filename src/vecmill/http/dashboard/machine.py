"""What the dashboard is told of the machine: memory as parts that sum up, the GPU, the processor, and what is wrong."""

from __future__ import annotations

import os
from dataclasses import asdict
from time import monotonic
from typing import Any

import psutil

from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.memory_parts import MemoryMeter, MemoryParts, gpu_parts
from vecmill.http.capabilities import is_there, memory_of_gpu, warnings
from vecmill.http.services import Services

FRESH_SECONDS = 0.5  # the kernel takes a while to say it


class Machine:
    """Reads the machine. Belongs to the event loop's thread."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._meter = MemoryMeter(services.settings.engine.memory_floor_gb)
        self._memory_now: tuple[float, MemoryParts] | None = None
        self._cpu = CpuMeter()

    def memory(self) -> MemoryParts:
        """The machine's memory, as it was FRESH_SECONDS ago at most."""
        if self._memory_now is None or monotonic() - self._memory_now[0] > FRESH_SECONDS:
            self._memory_now = monotonic(), self._meter.machine(memory_of_gpu(self._services))
        return self._memory_now[1]

    def view(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "memory": self.memory_view(),
            "gpu": self._gpu(),
            "cpu": {"cores": os.cpu_count(), "process_ratio": self._cpu.ratio()},
        }

    def memory_view(self) -> dict[str, Any]:
        """Its parts, as JSON; those of a GPU's own memory in `gpu`."""
        of_gpu = memory_of_gpu(self._services)
        has_own = self._services.gpu().gpu is not None or self._services.gpu_in_use()
        parts = {f"{name}_bytes": value for name, value in asdict(self.memory()).items()}
        own = None
        if has_own and not of_gpu.unified:
            gpu = gpu_parts(of_gpu, in_use=self._services.gpu_in_use())
            own = {f"{name}_bytes": value for name, value in asdict(gpu).items()}
        return {"unified": of_gpu.unified is True, **parts, "gpu": own}

    def _gpu(self) -> dict[str, Any] | None:
        look, in_use = self._services.gpu(), self._services.gpu_in_use()
        if not is_there(look, in_use=in_use):
            return None
        gpu = look.gpu or GpuReading()
        return {
            "name": gpu.name,
            "in_use": in_use,
            "stale": look.stale,
            "utilization_ratio": gpu.utilization_ratio,
            "sm_clock_mhz": gpu.sm_clock_mhz,
            "clock_verdict": look.clock.state.value,
            "clock_text": look.clock.message if look.reason is None else look.reason,
            "power_watts": gpu.power_watts,
            "temperature_c": gpu.temperature_c,
        }

    def warnings(self) -> list[dict[str, str]]:
        """What is wrong though requests are served: a name for programs, and a sentence with the cure."""
        services = self._services
        look = services.gpu()
        named = [("gpu_driver" if look.stale else "gpu_clock", text) for text in warnings(look)]
        folder = services.state()
        if folder is not None and folder.problem:
            named.append(("state", folder.problem))
        cures = {
            "jobs": "They are kept in memory until then. Look at the log and at STATE_DIR, or at REDIS_URL.",
            "cache": "Texts are computed again until then. Look at the log and at STATE_DIR, or at REDIS_URL.",
            "batches": "Look at the log and at STATE_DIR, or at BATCH_DIR.",
        }
        if folder is None or folder.problem is None:
            named += [(name, f"{text} {cures[name]}") for name, text in services.kept().items() if text]
        splits = services.inference.stats.splits
        if splits:
            named.append(("out_of_memory", f"{splits} {OUT_OF_MEMORY}"))
        if (memory := self.memory()).free + memory.page_cache < memory.floor:
            named.append(("memory", SHORT))
        return [{"name": name, "text": text} for name, text in named]


OUT_OF_MEMORY = (
    "forward passes did not fit into the device's memory and were halved: stop what else uses it, or lower "
    "MAX_BATCH_TOKENS."
)
SHORT = (
    "The machine has less memory left than must stay free (MEMORY_FLOOR_GB), so requests are refused: stop what else "
    "holds memory."
)


class CpuMeter:
    """How much of the processor this process uses."""

    LEAST_SECONDS = 1.0

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._at, self._used = monotonic(), self._seconds()
        self._ratio: float | None = None

    def ratio(self) -> float | None:
        """The share of all cores since it was last asked; None in the first second."""
        now, used = monotonic(), self._seconds()
        if now - self._at >= self.LEAST_SECONDS:
            share = (used - self._used) / (now - self._at) / (os.cpu_count() or 1)
            self._ratio = round(min(1.0, share), 4)
            self._at, self._used = now, used
        return self._ratio

    def _seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)
