"""Whether an allocation above the process's own cap is refused at once."""

from __future__ import annotations

from time import perf_counter

import torch

from vecmill.engine.probes.results import Oversized

# Small on purpose: a GB10 that really runs out of memory freezes.
CAP = 1 << 30
ASKED_SHARE = 1.1


def allocation(device: str) -> Oversized:
    """Cap the process at 1 GiB and ask for a tenth more. CUDA only."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    requested = int(CAP * ASKED_SHARE)
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total), device)
    started = perf_counter()
    try:
        refused = _refused(requested, device)
    finally:
        seconds = perf_counter() - started
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
    return Oversized(CAP, requested, refused, seconds, _works(device))


def _refused(size: int, device: str) -> str | None:
    """The class of the exception; whatever was allocated is free again."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        return type(error).__name__
    return None


def _works(device: str) -> bool:
    ones = torch.ones(64, 64, device=device)
    return bool((ones @ ones == 64).all().item())
