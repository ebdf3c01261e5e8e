"""What torch was built for, and what it finds."""

from __future__ import annotations

import torch

from vecmill.core.errors import first_line
from vecmill.engine.device import gpu_uuid
from vecmill.engine.probes.results import ClaimedMemory, GpuSeen, TorchBuild


def torch_build(device: str) -> TorchBuild:
    """Ask torch; `device` does not matter."""
    usable = torch.cuda.is_available()
    return TorchBuild(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        arch_list=tuple(torch.cuda.get_arch_list()) if usable else (),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())) if usable else (),
        cuda_error=None if usable or torch.version.cuda is None else _cuda_error(),
        mps=torch.backends.mps.is_available(),
    )


def _gpu(index: int) -> GpuSeen:
    properties = torch.cuda.get_device_properties(index)
    return GpuSeen(properties.name, (properties.major, properties.minor), gpu_uuid(torch.device("cuda", index)))


def _cuda_error() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "torch finds no GPU"


def claimed_memory(device: str) -> ClaimedMemory:
    """What CUDA says of the device's memory."""
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return ClaimedMemory(free, total, bool(torch.cuda.get_device_properties(device).is_integrated))
