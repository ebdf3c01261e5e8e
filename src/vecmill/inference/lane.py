"""Whether somebody waits for the answer to a request, or it only has to get done."""

from __future__ import annotations

from vecmill.core.types import Caller, Lane

# What a person's search sends, with room to spare; an indexer's batches are larger.
FEW_TEXTS = 8
FEW_TOKENS = 512


def choose_lane(caller: Caller, *, is_query: bool, texts: int, tokens: int) -> Lane:
    """What the request says; else interactive for queries, reranking, and few texts with few tokens of no job."""
    if caller.lane is not None:
        return caller.lane
    small = texts <= FEW_TEXTS and tokens <= FEW_TOKENS
    return Lane.INTERACTIVE if is_query or (small and caller.job_id is None) else Lane.BULK
