"""How many texts a client should put in one request."""

from __future__ import annotations

# A chunk of code, on average.
TOKENS_PER_TEXT = 128
# A client that sends one request after another leaves the device idle in between: so many make little of that.
FORWARDS_PER_REQUEST = 4
FEWEST = 8


def recommended_batch_size(max_batch_tokens: int, max_batch_size: int) -> int:
    """Texts per request: four bulk forward passes of `max_batch_tokens`, as a multiple of 8.

    Never above a forward's rows. The device's memory is in it: `max_batch_tokens` is what warm-up found to fit, and it
    is lowered once a batch did not. What is free at the moment says nothing: torch keeps what the largest batch took.
    """
    texts = FORWARDS_PER_REQUEST * max_batch_tokens // TOKENS_PER_TEXT // FEWEST * FEWEST
    return max(1, min(max(texts, FEWEST), max_batch_size))
