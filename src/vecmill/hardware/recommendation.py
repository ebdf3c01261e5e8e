"""How many texts a client should put in one request."""

from __future__ import annotations

# On a CPU a request of this many code chunks takes about a fifth of a second, and fills two forward passes.
CPU_BATCH = 32


def recommended_batch_size(gpu_available_mb: int | None, max_batch_size: int) -> int:
    """Texts per request: by available GPU memory as the servers before this one did, never above a forward's rows."""
    if gpu_available_mb is None:
        return min(CPU_BATCH, max_batch_size)
    for above_gb, batch in ((80, 64), (60, 48), (40, 32)):
        if gpu_available_mb > above_gb * 1024:
            return min(batch, max_batch_size)
    return min(8, max_batch_size)
