"""Whether somebody waits for the answer to a request, or it only has to get done."""

from __future__ import annotations

from vecmill.core.types import Caller, Lane

# What a person's search sends, with room to spare; an indexer's batches are larger.
FEW_TEXTS = 8
FEW_TOKENS = 512


CHARACTERS_PER_TOKEN = 4  # about, for texts that are not counted yet


def expected_lane(caller: Caller, *, is_query: bool, texts: int, estimated_tokens: int) -> Lane:
    """The lane before tokens are counted; estimates count characters."""
    return choose_lane(caller, is_query=is_query, texts=texts, tokens=estimated_tokens // CHARACTERS_PER_TOKEN)


def choose_lane(caller: Caller, *, is_query: bool, texts: int, tokens: int) -> Lane:
    """What the request says; else interactive for queries, reranking, and few texts with few tokens of no job."""
    if caller.lane is not None:
        return caller.lane
    small = texts <= FEW_TEXTS and tokens <= FEW_TOKENS
    return Lane.INTERACTIVE if is_query or (small and caller.job_id is None) else Lane.BULK
