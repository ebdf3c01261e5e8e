"""From the model's full-width vectors to what was asked for, in float32."""

from __future__ import annotations

import numpy as np

from vecmill.core.errors import InvalidInput
from vecmill.core.types import Matrix, ModelCard, Vector

SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's


def check_dimensions(card: ModelCard, dimensions: int | None) -> None:
    """Refuse before any work is done.

    Raises:
        InvalidInput: `dimensions` is not in 1..card.dimensions.
    """
    if dimensions is not None and not 1 <= dimensions <= card.dimensions:
        raise InvalidInput(
            f"`dimensions` is {dimensions}; {card.id} gives 1 to {card.dimensions}. Leave it out for all.",
            param="dimensions",
        )


def finish(vectors: Matrix, dimensions: int | None, normalize: bool) -> Matrix:
    """Slice, then normalise to unit length: (n, full) -> (n, dimensions or full)."""
    sliced = vectors[:, :dimensions] if dimensions is not None else vectors
    return unit(sliced) if normalize else np.ascontiguousarray(sliced)


def unit(vectors: Matrix) -> Matrix:
    """(n, d) -> (n, d) of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: Matrix = vectors / np.maximum(norms, SMALLEST_NORM)
    return normalized


def cosines(query: Vector, documents: Matrix) -> Vector:
    """Cosine of one vector with each row: (d,), (n, d) -> (n,), within -1..1."""
    similarities: Vector = unit(documents) @ unit(query[None])[0]
    return np.clip(similarities, np.float32(-1), np.float32(1))


def zero_to_one(similarities: Vector) -> Vector:
    """Cosine -1..1 -> relevance score 0..1, order kept and without ties at the ends."""
    return (similarities + np.float32(1)) / np.float32(2)
