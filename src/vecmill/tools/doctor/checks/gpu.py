"""What NVML says of the GPU, field by field."""

from __future__ import annotations

from dataclasses import fields

from vecmill.hardware.gpu import GpuReading
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding, Status, ok, warn

# What every card with memory of its own answers.
EXPECTED = (
    "name",
    "uuid",
    "driver_version",
    "compute_capability",
    "temperature_c",
    "sm_clock_mhz",
    "memory_total_mb",
    "memory_free_mb",
)


def check(context: Context) -> Finding:
    """Read all of it once."""
    if context.gpu is not None:
        return judge(context.gpu)
    if context.has_gpu or context.cards:
        return warn(
            f"there is an NVIDIA GPU, and NVML says nothing of it: {context.no_gpu}",
            "In a container: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the "
            "driver's libraries.",
        )
    return ok("no NVIDIA GPU here")


def judge(gpu: GpuReading) -> Finding:
    """Missing fields are normal on a GB10 and its like, whose memory is the machine's."""
    missing = gpu.not_available or {}
    values = {
        one.name: _shown(gpu, one.name) if one.name not in missing else f"not available: {missing[one.name]}"
        for one in fields(gpu)
        if one.name != "not_available"
    }
    seen = f"{gpu.name}: {len(values) - len(missing)} fields"
    if missing:
        seen += f", and {len(missing)} are not available"
        seen += ", which is normal for it" if gpu.unified else ""
    unexpected = [name for name in EXPECTED if name in missing and not gpu.unified]
    if unexpected:
        return Finding(Status.WARN, f"{seen}: {', '.join(unexpected)} should be", "nvidia-smi -q", values, listed=True)
    return Finding(Status.OK, seen, None, values, listed=True)


def _shown(gpu: GpuReading, name: str) -> object:
    if name == "processes":
        of_all = (f"{process.pid}: {_megabytes(process.memory_mb)}" for process in gpu.processes or ())
        return ", ".join(of_all) or "none"
    if name == "clock_reasons":
        return ", ".join(gpu.clock_reasons or ()) or "none"
    return getattr(gpu, name)


def _megabytes(memory: int | None) -> str:
    return "memory not available" if memory is None else f"{memory} MB"
