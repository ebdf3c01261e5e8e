"""How many texts a client should put in one request."""

from __future__ import annotations

# A chunk of code, on average.
TOKENS_PER_TEXT = 128
# A client that sends one request after another leaves the device idle in between: so many make little of that.
FORWARDS_PER_REQUEST = 4
FEWEST = 8


def recommended_batch_size(max_batch_tokens: int, gpu_available_mb: int | None, max_batch_size: int) -> int:
    """Texts per request: four bulk forward passes of `max_batch_tokens`, as a multiple of 8.

    Less where little memory is left on a GPU, by the steps of the servers before this one; never above a forward's
    rows.
    """
    texts = FORWARDS_PER_REQUEST * max_batch_tokens // TOKENS_PER_TEXT // FEWEST * FEWEST
    return max(1, min(max(texts, FEWEST), _by_memory(gpu_available_mb), max_batch_size))


def _by_memory(gpu_available_mb: int | None) -> int:
    if gpu_available_mb is None:
        return 64
    for above_gb, batch in ((80, 64), (60, 48), (40, 32)):
        if gpu_available_mb > above_gb * 1024:
            return batch
    return FEWEST
