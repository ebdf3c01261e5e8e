"""From token vectors to one vector per row, in float32 whatever the weights' type."""

from __future__ import annotations

import torch
from torch import Tensor

from vecmill.models.checkpoint import Pooling
from vecmill.models.packing import PackedBatch


def pool(hidden: Tensor, packed: PackedBatch, mode: Pooling) -> Tensor:
    """(T, dimensions) token vectors of any dtype -> (N, dimensions) float32, in packed order."""
    if mode == "cls":
        return hidden[packed.first].float()
    if mode == "lasttoken":
        return hidden[packed.last].float()
    return mean(hidden, packed)


def mean(hidden: Tensor, packed: PackedBatch) -> Tensor:
    """Mean over the tokens of each row that are pooled; each row is summed by itself, whatever it was packed with.

    A row of which none is pooled gives NaN.
    """
    vectors, counts = hidden.float(), packed.lengths.float()
    if packed.pooled is not None:
        vectors = vectors * packed.pooled
        counts = torch.segment_reduce(packed.pooled[:, 0], "sum", lengths=packed.lengths, unsafe=True)
    sums = torch.segment_reduce(vectors, "sum", lengths=packed.lengths, axis=0, unsafe=True)
    return sums[packed.segments] / counts[packed.segments, None]
