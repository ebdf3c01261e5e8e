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
    """Rows sorted by length, concatenated. N = rows, T = all tokens; a filler row may follow the last."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, restarting at 0 with each row
    cu_seqlens: torch.Tensor  # (N + 1 or 2,) int32 on the device: where each row starts, and T
    lengths: torch.Tensor  # (N or N + 1,) int64 on the device
    max_length: int
    groups: tuple[EqualLengths, ...]
    order: tuple[int, ...]
    """`order[i]` is the caller's index of packed row i; N long."""


def pack(rows: Sequence[TokenIds], device: torch.device) -> PackedBatch:
    """Pack non-empty rows of token ids for one forward pass."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    parts = [rows[index] for index in order]
    positions = [np.arange(len(row)) for row in parts]
    if filler := _filler(sum(map(len, rows))):
        parts.append(np.zeros(filler, dtype=np.int32))
        positions.append(np.zeros(filler, dtype=np.int64))
    lengths = [len(part) for part in parts]
    groups, start = [], 0
    for length, members in groupby(lengths):
        count = len(list(members))
        groups.append(EqualLengths(start, count, length))
        start += count * length
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(device),
        position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
        lengths=torch.tensor(lengths, device=device),
        max_length=max(lengths),
        groups=tuple(groups),
        order=tuple(order),
    )


def _filler(tokens: int) -> int:
    """Tokens that round a pack up, a few percent at most.

    Kernel libraries keep what they prepare for each shape of a matrix product: with every total its own shape,
    memory grows for hours (oneDNN, 300 MB and more). Rounded, there are some dozens of shapes.
    """
    return -tokens % (16 if tokens <= 256 else 64)
