"""Doing what may not fit into the device's memory, and having that memory back when it does not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# In whatever case they are written. Of the allocators of CUDA, HIP, XPU and MPS, of the driver and what is called on it
# ("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"); of NVIDIA's
# libraries; of a GPU without memory of its own, where torch's allocator fails over its own report, for which NVML has
# nothing to say; of the CPU's allocator, of oneDNN and of the C library.
WORDS = (
    "out of memory",
    "out_of_memory",
    "cudaerrormemoryallocation",
    "status_alloc_failed",
    "status_internal_error_device_allocation_failed",
    "status_internal_error_host_allocation_failed",
    "insufficient memory",
    "nvml_success == r internal assert failed",
    "invalid buffer size",
    "defaultcpuallocator",
    "could not create a primitive",
    "could not create a memory",
    "cannot allocate memory",
    "can't allocate memory",
    "std::bad_alloc",
)


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """What the function gives; None where it ran out of memory.

    Raises:
        Exception: what the function raised for any other reason.
    """
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Out here: the exception held the frames, and the frames what they had allocated.
    _give_back()
    return None


def _give_back() -> None:
    """Let go of what torch keeps for later, on every device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once may work: by the type, or by the words of who ran out, which torch passes on or wraps."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in said for words in WORDS):
        return True
    cause = getattr(error, "inner_exception", None) or error.__cause__
    return cause is not None and is_out_of_memory(cause)
