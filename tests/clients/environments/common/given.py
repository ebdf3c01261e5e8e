"""Where the servers are and what they must answer, from the file that VECMILL_CLIENTS_GIVEN names.

It needs the standard library alone: it is imported in environments that have little in common.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from operator import mul
from pathlib import Path
from typing import Any

_given: dict[str, Any] = json.loads(Path(os.environ["VECMILL_CLIENTS_GIVEN"]).read_text("utf-8"))

URL: str = _given["url"]
LOCKED_URL: str = _given["locked_url"]
"""A server that wants KEY and knows models by their names only."""
KEY: str = _given["key"]
MODEL: str = _given["model"]

TEXTS: list[str] = _given["texts"]
VECTORS: list[list[float]] = _given["vectors"]
TOKENS: int = _given["tokens"]
"""Of all TEXTS together."""

LONG_TEXT: str = _given["long_text"]
"""Longer than the model reads."""
LONG_VECTOR: list[float] = _given["long_vector"]

QUERY: str = _given["query"]
DOCUMENTS: list[str] = _given["documents"]
COSINES: list[float] = _given["cosines"]
SCORES = [(1 + cosine) / 2 for cosine in COSINES]
RANKING = sorted(range(len(DOCUMENTS)), key=lambda index: -COSINES[index])
"""Indices of the documents, best first."""
RERANK_TOKENS: int = _given["rerank_tokens"]


def assert_vectors(
    answered: Iterable[Iterable[float]], right: Sequence[Sequence[float]] = VECTORS, *, normalized: bool = True
) -> None:
    """Check that the vectors are as many, in this order and of these directions, and of length 1 if normalised."""
    vectors = [[float(value) for value in vector] for vector in answered]
    assert len(vectors) == len(right)
    for index, (vector, other) in enumerate(zip(vectors, right, strict=True)):
        assert len(vector) == len(other)
        assert cosine(vector, other) > 0.9999, f"vector {index}"
        if normalized:
            assert abs(math.hypot(*vector) - 1) < 1e-3, f"vector {index}"


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """The cosine of the angle between two vectors."""
    return sum(map(mul, left, right)) / (math.hypot(*left) * math.hypot(*right))


def assert_ranking(
    answered: Iterable[tuple[int, float]], top_n: int | None = None, *, right: Sequence[float] = SCORES
) -> None:
    """Check the pairs (index, score): the best `top_n` documents, best first."""
    pairs = list(answered)
    assert [index for index, _ in pairs] == RANKING[:top_n]
    for index, score in pairs:
        assert abs(score - right[index]) < 1e-4, f"document {index}"


def assert_signs(packed: Iterable[Iterable[int]], *, signed: bool) -> None:
    """Check vectors of one bit per dimension, eight to a byte, most significant first; signed bytes are 128 less."""
    for answered, vector in zip(packed, VECTORS, strict=True):
        octets = [octet + 128 * signed for octet in answered]
        bits = [octet >> 7 - bit & 1 for octet in octets for bit in range(8)]
        for bit, value in zip(bits, vector, strict=True):
            assert bit == (value > 0) or abs(value) < 1e-6  # nearer to zero than float32 tells apart
