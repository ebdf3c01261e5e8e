"""Vectors as they are answered: cut to the dimensions asked for and normalised; and scores of similar ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vecmill.core.errors import InvalidInput
from vecmill.core.types import Matrix, ModelCard, Scores, Vector

ROWS_AT_A_TIME = 64
SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's
LAYER_NORM_EPSILON = 1e-5  # torch.nn.functional.layer_norm's


def check_dimensions(card: ModelCard, dimensions: int | None) -> None:
    """Refuse before any work is done.

    Raises:
        InvalidInput: the model is not trained for so many dimensions.
    """
    if dimensions is None or dimensions in card.supported_dimensions:
        return
    raise InvalidInput(
        f"`dimensions` is {dimensions}; {card.id} gives {describe_dimensions(card)}. Leave it out for all.",
        param="dimensions",
    )


def describe_dimensions(card: ModelCard) -> str:
    """The sizes a client can ask for, in words."""
    possible = card.supported_dimensions
    if len(possible) == 1:
        return f"only {possible[0]} (it is not trained for fewer)"
    return f"{possible[0]} to {possible[-1]}" if isinstance(possible, range) else ", ".join(map(str, possible))


def finish_vectors(
    rows: Sequence[Vector], dimensions: int | None, normalize: bool, *, layer_norm: bool = False
) -> Matrix:
    """Slice, then normalise to unit length: n vectors of full width -> (n, dimensions or full).

    `layer_norm` norms the full vector before it is cut to fewer dimensions. Nothing else of the result's size is made
    on the way.
    """
    full = len(rows[0])
    width = full if dimensions is None else min(dimensions, full)
    finished: Matrix = np.empty((len(rows), width), np.float32)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        vectors = np.stack(rows[start : start + ROWS_AT_A_TIME])
        if width < full:
            vectors = (_layer_norm(vectors) if layer_norm else vectors)[:, :width]
        finished[start : start + ROWS_AT_A_TIME] = unit(vectors) if normalize else vectors
    return finished


def _layer_norm(vectors: Matrix) -> Matrix:
    """torch.nn.functional.layer_norm over each row, without weights."""
    centered = vectors - vectors.mean(axis=1, keepdims=True)
    normed: Matrix = centered / np.sqrt(np.square(centered).mean(axis=1, keepdims=True) + LAYER_NORM_EPSILON)
    return normed


def unit(vectors: Matrix) -> Matrix:
    """(n, d) -> (n, d) of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: Matrix = vectors / np.maximum(norms, SMALLEST_NORM)
    return normalized


def cosines(queries: Matrix, documents: Matrix) -> Scores:
    """Cosine of each document with its query: (1 or n, d), (n, d) -> (n,), within -1..1."""
    similarities: Scores = np.clip(_products(unit(queries), unit(documents)), -1.0, 1.0)
    return similarities


def _products(queries: Matrix, documents: Matrix) -> Scores:
    """Of each document with its query: (1 or n, d), (n, d) -> (n,). Row by row: the sums of a matrix product, and of
    einsum where it converts, are divided by the number of rows, and a score would depend on the other documents."""
    products = np.empty(len(documents), np.float64)
    for start in range(0, len(documents), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        of_rows = queries if len(queries) == 1 else queries[rows]
        np.multiply(of_rows, documents[rows], dtype=np.float64).sum(axis=1, out=products[rows])
    return products


def similarities(card: ModelCard, queries: Matrix, documents: Matrix) -> Scores:
    """Similarity of each document with its query, by the model's own function: (1 or n, d), (n, d) -> (n,).

    Source: sentence_transformers.util.similarity; a distance is negative, so that more is nearer.
    """
    if card.similarity == "cosine":
        return cosines(queries, documents)
    if card.unit_vectors:
        queries, documents = unit(queries), unit(documents)
    if card.similarity == "dot":
        return _products(queries, documents)
    order = 1 if card.similarity == "manhattan" else 2
    distances: Scores = np.linalg.norm(documents - queries, ord=order, axis=1).astype(np.float64)
    return -distances


def similarity_to_relevance(card: ModelCard, similarities: Scores) -> Scores:
    """What `similarities` gives -> relevance score 0..1, order kept and without ties at the ends."""
    if card.similarity in ("euclidean", "manhattan"):
        return 1 / (1 - similarities)
    if card.similarity == "dot" and not card.unit_vectors:  # without bounds
        similarities = similarities / (1 + np.abs(similarities))
    return (similarities + 1) / 2


def logit_to_relevance(logits: Scores) -> Scores:
    """Sigmoid; in float64, where logits up to 36 still differ from each other."""
    relevance: Scores = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
    return relevance
