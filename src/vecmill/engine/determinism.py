"""DETERMINISTIC=true: a row's answer has the same bits whatever else is in its batch.

Kernel libraries choose by a product's shape how its sums are divided, and vectorised loops treat the last elements of a
tensor, or of a thread's part of it, in another way than the rest. So the bits of a row depend on the size of the whole
pack and on the row's place in it. Here each row runs in a pack of its own, the shape of which depends on its length
alone (`forward.pack_part`), always with the same threads, and in kernels that are chosen by shape: the computation is
then the same one each time, for every family, whatever its layers are.

Sources: https://docs.pytorch.org/docs/stable/notes/randomness.html; the section "Results reproducibility" of
https://docs.nvidia.com/cuda/cublas/.
"""

from __future__ import annotations

import os
import platform

import torch

from vecmill.core.errors import StartupError
from vecmill.models.packing import Attention

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""With which cuBLAS gives the same bits, also where several streams run."""


def check(device: torch.device) -> None:
    """Refuse a device of which the same bits cannot be promised.

    Raises:
        StartupError: with its name and the cure.
    """
    if device.type == "mps":
        name, cure = "an Apple GPU", "set DEVICE=cpu"
    elif device.type == "cuda" and torch.version.hip is not None:
        name, cure = "an AMD GPU", "set DEVICE=cpu"
    elif device.type == "cuda" and os.environ.get(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        name, cure = f"{WORKSPACE}={os.environ[WORKSPACE]}", f"remove {WORKSPACE}, or set it to {WORKSPACES[0]}"
    else:
        return
    raise StartupError(
        f"DETERMINISTIC=true with {name}: its kernels are not known to give the same bits each time: {cure}, or leave "
        f"DETERMINISTIC out."
    )


def configure(device: torch.device) -> None:
    """Have a CUDA device refuse kernels that give other bits each time. To be called before anything runs there."""
    if device.type != "cuda":
        return
    os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    torch.use_deterministic_algorithms(True)
    # It would cost a kernel for each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def numerics(device: torch.device, attention: Attention, threads: int) -> str:
    """All that the bits of a row's answer depend on, beside the model, its type and the row."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{properties.name} {properties.major}.{properties.minor} CUDA {torch.version.cuda}"
    else:
        where = f"{platform.machine()} {_processor()} {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return f"torch {torch.__version__}, {where}, {attention.value}"


def _processor() -> str:
    """Its name: libraries choose kernels, and how they divide sums, by its instructions and its caches."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
            return next(names, platform.processor())
    except OSError:
        return platform.processor()
