"""Ragged rows end to end in one row: no padding, shared prefixes once, and the lengths that keep the rows apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from vecmill.core.types import Prefix, Row, TokenIds
from vecmill.models.prefix_memory import Layers, PrefixMemory


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """Neighbouring segments of equal length that follow the same prefix, if any: one attention call serves them."""

    start: int
    rows: int
    length: int
    prefix: tuple[int, int] | None = None
    """First token and length of the prefix; from T on are those that were recalled."""


@dataclass(frozen=True, slots=True)
class NewPrefix:
    """A prefix in the pack, and what attention saw of it, for batches to come."""

    prefix: Prefix
    start: int
    layers: Layers


@dataclass(frozen=True, slots=True)
class Keys:
    """Which tokens the queries of each segment look at, where some look at a prefix too."""

    index: Tensor  # (K,) int64: the tokens, segment by segment; a prefix's once for each segment that follows it
    cu_seqlens: Tensor  # (S + 1,) int32
    max_length: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N rows as S segments of T tokens in all. Segments are rows, the prefixes they share, and a filler."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, restarting at 0 with each row
    token_type_ids: Tensor  # (1, T) int64
    pooled: Tensor | None  # (T, 1) float32: 0 where a token is left out of mean pooling; None: all are in
    cu_seqlens: Tensor  # (S + 1,) int32: where each segment starts, and T
    max_length: int
    lengths: Tensor  # (S,) int64
    segments: Tensor  # (N,) int64: the segment of each row
    keys: Keys | None
    """None where no row has a prefix: each segment looks at itself."""
    new_prefixes: tuple[NewPrefix, ...]
    """Empty where there is no memory to keep them."""
    recalled: tuple[Layers, ...]
    """Prefixes computed in an earlier batch; their tokens count from T on."""
    groups: tuple[EqualLengths, ...]
    order: tuple[int, ...]
    """`order[i]` is the caller's index of packed row i; N long."""

    @property
    def first(self) -> Tensor:
        """(N,) index of each row's first token."""
        return self.cu_seqlens[self.segments].long()

    @property
    def last(self) -> Tensor:
        """(N,) index of each row's last token."""
        return self.cu_seqlens[self.segments + 1].long() - 1


@dataclass(frozen=True, slots=True)
class _Segment:
    token_ids: TokenIds
    start: int
    position: int = 0
    prefix: tuple[int, int] | None = None
    index: int | None = None
    """The caller's index of the row; None for a prefix and the filler."""
    unpooled: int = 0
    second_text: int | None = None
    shared: Prefix | None = None
    """The prefix that it is."""

    def __len__(self) -> int:
        return len(self.token_ids)


def pack(rows: Sequence[Row], device: torch.device, memory: PrefixMemory | None = None) -> PackedBatch:
    """Pack rows for one forward pass: those without a prefix by length, then each prefix and what follows it.

    A prefix that `memory` recalls is not in the pack.
    """
    recalled = _recalled(rows, memory) if memory is not None else {}
    segments = _segments(rows, recalled)
    lengths = [len(segment) for segment in segments]
    cu_seqlens = _cumulative(lengths)
    of_rows = [number for number, segment in enumerate(segments) if segment.index is not None]
    return PackedBatch(
        input_ids=_tokens([segment.token_ids for segment in segments]).to(device),
        position_ids=_tokens([np.arange(len(segment)) + segment.position for segment in segments]).to(device),
        token_type_ids=_tokens([_token_types(segment) for segment in segments]).to(device),
        pooled=_pooled(segments, cu_seqlens, device),
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
        max_length=max(lengths),
        lengths=torch.tensor(lengths, device=device),
        segments=torch.tensor(of_rows, device=device),
        keys=_keys(segments, device),
        new_prefixes=tuple(
            NewPrefix(segment.shared, segment.start, [])
            for segment in segments
            if segment.shared is not None and memory is not None
        ),
        recalled=tuple(recalled.values()),
        groups=_groups(segments),
        order=tuple(segment.index for segment in segments if segment.index is not None),
    )


def _recalled(rows: Sequence[Row], memory: PrefixMemory) -> dict[Prefix, Layers]:
    prefixes = dict.fromkeys(row.prefix for row in rows if row.prefix is not None)
    return {prefix: layers for prefix in prefixes if (layers := memory.recall(prefix)) is not None}


def _segments(rows: Sequence[Row], recalled: Collection[Prefix]) -> list[_Segment]:
    families: dict[Prefix | None, list[int]] = {}
    for index, row in enumerate(rows):
        families.setdefault(row.prefix, []).append(index)
    spans = _recalled_spans(rows, families, recalled)
    segments: list[_Segment] = []
    start = 0
    for prefix in sorted(families, key=lambda prefix: prefix is not None):  # stable: in order of first appearance
        if prefix is not None and prefix not in spans:
            spans[prefix] = (start, len(prefix))
            segments.append(_Segment(prefix.token_ids, start, shared=prefix))
            start += len(prefix)
        span = spans[prefix] if prefix is not None else None
        for index in sorted(families[prefix], key=lambda index: len(rows[index].token_ids)):
            row = rows[index]
            position = len(prefix) if prefix else 0
            segments.append(_Segment(row.token_ids, start, position, span, index, row.unpooled, row.second_text))
            start += len(row.token_ids)
    if filler := _filler(start):
        segments.append(_Segment(np.zeros(filler, dtype=np.int32), start))
    return segments


def _recalled_spans(
    rows: Sequence[Row], families: Iterable[Prefix | None], recalled: Collection[Prefix]
) -> dict[Prefix, tuple[int, int]]:
    """Where the keys of recalled prefixes are: after all tokens of the pack."""
    new = sum(len(prefix) for prefix in families if prefix is not None and prefix not in recalled)
    tokens = new + sum(len(row.token_ids) for row in rows)
    start = tokens + _filler(tokens)
    spans = {}
    for prefix in recalled:
        spans[prefix] = (start, len(prefix))
        start += len(prefix)
    return spans


def _filler(tokens: int) -> int:
    """Tokens that round a pack up, a few percent at most.

    Kernel libraries keep what they prepare for each shape of a matrix product: with every total its own shape,
    memory grows for hours (oneDNN, 300 MB and more). Rounded, there are some dozens of shapes.
    """
    return -tokens % (16 if tokens <= 256 else 64)


def _tokens(parts: Sequence[np.typing.NDArray[np.integer]]) -> Tensor:
    """(T,) in parts -> (1, T) int64."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def _cumulative(lengths: Sequence[int]) -> np.typing.NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _token_types(segment: _Segment) -> np.typing.NDArray[np.int64]:
    types = np.zeros(len(segment), dtype=np.int64)
    if segment.second_text is not None:
        types[segment.second_text :] = 1
    return types


def _pooled(
    segments: Sequence[_Segment], cu_seqlens: np.typing.NDArray[np.int32], device: torch.device
) -> Tensor | None:
    if not any(segment.unpooled for segment in segments):
        return None
    pooled = torch.ones(int(cu_seqlens[-1]), 1)
    for segment in segments:
        pooled[segment.start : segment.start + segment.unpooled] = 0
    return pooled.to(device)


def _keys(segments: Sequence[_Segment], device: torch.device) -> Keys | None:
    if all(segment.prefix is None for segment in segments):
        return None
    parts = []
    for segment in segments:
        own = np.arange(segment.start, segment.start + len(segment))
        first, length = segment.prefix or (0, 0)
        parts.append(np.concatenate((np.arange(first, first + length), own)))
    lengths = [len(part) for part in parts]
    return Keys(
        index=torch.from_numpy(np.concatenate(parts)).to(device),
        cu_seqlens=torch.from_numpy(_cumulative(lengths)).to(device),
        max_length=max(lengths),
    )


def _groups(segments: Sequence[_Segment]) -> tuple[EqualLengths, ...]:
    groups = []
    for (length, prefix), found in groupby(segments, key=lambda segment: (len(segment), segment.prefix)):
        members = list(found)
        groups.append(EqualLengths(members[0].start, len(members), length, prefix))
    return tuple(groups)
