"""What a vector is kept under: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import json
from hashlib import blake2b

from vecmill.core.types import ModelCard, Row

KEY_BYTES = 16
# Raised when the same tokens give other vectors than before: a new packing, another pooling. 2: the positions of tokens
# after a padding in an XLM-R's text.
FORMAT = 2


def model_fingerprint(card: ModelCard) -> bytes:
    """Of the model as it is loaded: which weights, in which type, pooled how. Prompts are part of the token ids."""
    parts = [FORMAT, card.id, card.revision, card.family, card.dtype, card.pooling, card.dimensions]
    return blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def fingerprint_of(fingerprint: bytes, owner: str) -> bytes:
    """A model's fingerprint among the vectors that one API key has for itself."""
    return blake2b(owner.encode(), digest_size=len(fingerprint), key=fingerprint).digest()


def row_key(fingerprint: bytes, row: Row) -> bytes:
    """Of one input: the token ids that the model runs, and which of them it leaves out of the mean."""
    digest = blake2b(row.token_ids.tobytes(), digest_size=KEY_BYTES, key=fingerprint)
    digest.update(b"%d,%d" % (row.unpooled, -1 if row.second_text is None else row.second_text))
    return digest.digest()
