"""Which device, and what its memory says."""

from __future__ import annotations

import torch

from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.hardware.gpu import nvidia_gpu_present
from vecmill.hardware.memory import MEGABYTE, DeviceMemory


def choose_device(wanted: str) -> torch.device:
    """Resolve DEVICE.

    Raises:
        StartupError: the device is not there, or a GPU is present and this torch cannot use it.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise StartupError("DEVICE=mps, but this torch sees no Apple GPU: set DEVICE=cpu or DEVICE=auto.")
        return torch.device("mps")
    if torch.cuda.is_available():
        return _cuda(wanted)
    if nvidia_gpu_present():
        raise _unusable_gpu()
    if wanted != "auto":
        raise StartupError(f"DEVICE={wanted}, but there is no CUDA GPU here: set DEVICE=cpu or DEVICE=auto.")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _cuda(wanted: str) -> torch.device:
    index = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise StartupError(f"DEVICE={wanted}, but there are {count} CUDA GPUs: set DEVICE=cuda:0 to cuda:{count - 1}.")
    return torch.device("cuda", index)


def _unusable_gpu() -> StartupError:
    if torch.version.cuda is None:
        return StartupError(
            f"There is an NVIDIA GPU here, but torch {torch.__version__} is a CPU-only build: install a CUDA build "
            f"(`pip install --force-reinstall 'torch>=2.11'`, CUDA 13 on a DGX Spark), or set DEVICE=cpu to serve "
            f"from the CPU."
        )
    return StartupObstacle(  # the driver may not be loaded yet when the machine starts
        f"There is an NVIDIA GPU here, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: "
        f"check the driver with `nvidia-smi` (CUDA 13 needs R580 or newer), or set DEVICE=cpu to serve from the CPU."
    )


def configure_device(device: torch.device, memory_fraction: float) -> None:
    """TF32 for what is left in float32, and a bound on what the allocator takes of a GPU's memory.

    This one call sets TF32 on every torch from 1.12 on without mixing its old and its new settings. Not on a CPU: there
    it lets oneDNN round float32 to bfloat16.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: events, properties and workspaces default to the current one
        torch.set_float32_matmul_precision("high")
        # cuDNN prepares a plan for each new shape, and the lengths of texts differ from batch to batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_per_process_memory_fraction(memory_fraction, device)


def describe(device: torch.device) -> str:
    """The device as people call it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """What torch holds on the device, in MB; None on a CPU, which has no memory of its own."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return DeviceMemory(
        total_mb=properties.total_memory // MEGABYTE,
        allocated_mb=torch.cuda.memory_allocated(device) // MEGABYTE,
        reserved_mb=torch.cuda.memory_reserved(device) // MEGABYTE,
        # cudaMemGetInfo counts the page cache as used where CPU and GPU share their memory.
        reported_free_mb=None if properties.is_integrated else torch.cuda.mem_get_info(device)[0] // MEGABYTE,
        unified=bool(properties.is_integrated),
    )


def gpu_uuid(device: torch.device) -> str | None:
    """The UUID by which NVML knows the device (`GPU-...`); None for what is no GPU."""
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
