"""Ragged rows end to end in one row: no padding, and the lengths that keep the rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from vecmill.core.types import TokenIds


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """`rows` neighbouring rows of `length` tokens each, from token `start` on: one attention call serves them."""

    start: int
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows sorted by length, concatenated. T = all tokens, N = rows."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, restarting at 0 with each row
    cu_seqlens: torch.Tensor  # (N + 1,) int32 on the device: where each row starts
    lengths: torch.Tensor  # (N,) int64 on the device
    max_length: int
    groups: tuple[EqualLengths, ...]
    order: tuple[int, ...]
    """`order[i]` is the caller's index of packed row i."""


def pack(rows: Sequence[TokenIds], device: torch.device) -> PackedBatch:
    """Pack non-empty rows of token ids for one forward pass."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    lengths = [len(rows[index]) for index in order]
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)))
    token_ids = np.concatenate([rows[index] for index in order]).astype(np.int64)
    position_ids = np.arange(len(token_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    groups, start = [], 0
    for length, members in groupby(lengths):
        count = len(list(members))
        groups.append(EqualLengths(start, count, length))
        start += count * length
    return PackedBatch(
        input_ids=torch.from_numpy(token_ids)[None].to(device),
        position_ids=torch.from_numpy(position_ids)[None].to(device),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
        lengths=torch.tensor(lengths, device=device),
        max_length=lengths[-1],
        groups=tuple(groups),
        order=tuple(order),
    )
