"""What a vector is kept under: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import json
from hashlib import blake2b

from vecmill.core.types import ModelCard, Row

KEY_BYTES = 16
# Raised when the same tokens give other vectors than before: a new packing, another pooling, or the positions of tokens
# after a padding in an XLM-R's text.
FORMAT = 2


def model_fingerprint(card: ModelCard) -> bytes:
    """Of the model as it is loaded: what was read of its files, in which type its weights are, pooled how.

    Prompts and truncation are part of the token ids. The device, the attention kernels and the versions of the
    libraries change the last bits only, which the stated tolerances allow for; but in float32 CUDA multiplies in TF32,
    which has 10 bits of mantissa.
    """
    dtype = "tf32" if card.dtype == "float32" and card.device.startswith("cuda") else card.dtype
    parts = [FORMAT, card.id, card.fingerprint, card.family, dtype, card.pooling, card.dimensions]
    return blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def fingerprint_of(fingerprint: bytes, owner: str) -> bytes:
    """A model's fingerprint among the vectors that one API key has for itself."""
    return blake2b(owner.encode(), digest_size=len(fingerprint), key=fingerprint).digest()


def row_key(fingerprint: bytes, row: Row) -> bytes:
    """Of one input: the token ids that the model runs, and which of them it leaves out of the mean."""
    digest = blake2b(row.token_ids.tobytes(), digest_size=KEY_BYTES, key=fingerprint)
    digest.update(b"%d,%d" % (row.unpooled, -1 if row.second_text is None else row.second_text))
    return digest.digest()
