"""Doing what may not fit into the device's memory, and having that memory back when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# torch's allocator, and oneDNN where it has no room for what it prepares.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """What the function gives; None where it ran out of memory.

    Raises:
        Exception: what the function raised for any other reason.
    """
    try:
        return function()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    # Out here: the exception held the frames, and the frames what they had allocated.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether less at once may work. On a CPU torch raises a plain RuntimeError, in the words of who ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
