"""From token vectors to one vector per row, in float32 whatever the weights' type."""

from __future__ import annotations

import torch
from torch import Tensor

from vecmill.models.checkpoint import Pooling
from vecmill.models.packing import PackedBatch


def pool(hidden: Tensor, packed: PackedBatch, mode: Pooling) -> Tensor:
    """(T, dimensions) token vectors of any dtype -> (N, dimensions) float32, in packed order, without the filler."""
    rows = len(packed.order)
    bounds = packed.cu_seqlens.long()
    if mode == "cls":
        return hidden[bounds[:rows]].float()
    if mode == "lasttoken":
        return hidden[bounds[1 : rows + 1] - 1].float()
    # Each row is summed by itself, so its mean does not depend on what it was packed with.
    sums = torch.segment_reduce(hidden.float(), "sum", lengths=packed.lengths, axis=0, unsafe=True)
    return sums[:rows] / packed.lengths[:rows, None]
