"""Ragged rows end to end in one row: no padding, shared prefixes once, and the lengths that keep the rows apart.

Keys and values of a prefix are kept as long as rows of its request wait: they are computed once, not once a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from itertools import groupby, pairwise
from operator import attrgetter
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from vecmill.core.types import Prefix, Row, TokenIds


class Attention(StrEnum):
    """What computes attention. Chosen when a model is loaded; `packed_attention` runs it."""

    FLASH = "flash"
    """torch's kernel for ragged rows: 16-bit types on CUDA. One call for all rows."""
    SDPA = "sdpa"
    """One call for each length that rows have, of any type on any device."""
    PRODUCTS = "products"
    """Matrix products of all heads of rows of about one length: bfloat16 on CPUs where that is faster."""


Window = tuple[int, int]
"""How many keys before and after its own a query sees, as torch's `varlen_attn` has it; -1: all of them."""
EVERYTHING: Window = (-1, -1)


@dataclass(slots=True)
class PrefixLayers:
    """Keys and values that attention saw of a prefix."""

    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer: (1, kv_heads, tokens, head_dim)."""
    computed: torch.cuda.Event | None = None
    """On CUDA: done once they are there. Only another stream than theirs has to wait for it."""

    def wait(self) -> None:
        """Let the current stream use them only when they are there, and keep their memory until it has."""
        if self.computed is None:
            return
        stream = torch.cuda.current_stream(self.tensors[0][0].device)
        stream.wait_event(self.computed)
        for tensor in (each for layer in self.tensors for each in layer):
            tensor.record_stream(stream)


# Of all prefixes together. A token of Qwen3-Reranker-8B takes 147 kB, so this is 0.6 GB at the most.
MOST_TOKENS = 4096


class PrefixMemory:
    """One model's memory. Belongs to the thread that owns the device; forgets a prefix when its request has ended."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._layers: WeakKeyDictionary[Prefix, PrefixLayers] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Tokens that are kept."""
        return sum(len(prefix) for prefix in list(self._layers))

    def recall(self, prefix: Prefix) -> PrefixLayers | None:
        """What was kept for a prefix."""
        return self._layers.get(prefix)

    def keep(self, prefix: Prefix, layers: PrefixLayers) -> None:
        """Keep what a forward pass computed, where there is room."""
        if layers.tensors and len(self) + len(prefix) <= self._most_tokens:
            self._layers[prefix] = layers


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """Neighbouring segments of equal length that follow the same prefix, if any: one attention call serves them."""

    start: int
    rows: int
    length: int
    prefix: tuple[int, int] | None = None
    """First token and length of the prefix; from T on are those that were recalled."""
    padded: tuple[int, int] | None = None
    """First and number of each row's keys among `padded_keys`: its prefix's, its own, and padding; None: not padded."""

    @property
    def before(self) -> int:
        """Keys of the prefix, which each row sees before its own."""
        return self.prefix[1] if self.prefix is not None else 0

    def of(self, tensor: Tensor) -> Tensor:
        """Its tokens of (1, heads, T, head_dim): (rows, heads, length, head_dim), without a copy.

        In one operation: there are dozens of these views in each layer of a pass, and each takes a microsecond.
        """
        _, of_head, of_token, of_value = tensor.stride()
        return tensor.as_strided(
            (self.rows, tensor.shape[1], self.length, tensor.shape[3]),
            (self.length * of_token, of_head, of_token, of_value),
            tensor.storage_offset() + self.start * of_token,
        )


@dataclass(frozen=True, slots=True)
class RowsAtOnce:
    """Rows of about one length, which are multiplied in one call."""

    groups: tuple[EqualLengths, ...]
    """The shortest rows first."""
    count: int
    """Rows of all groups: a power of two."""
    queries: int
    """Of each row, padding included."""
    keys: int
    """Of each row: its prefix's, its own, and padding."""
    before: int
    """Keys of each row's prefix."""


@dataclass(frozen=True, slots=True)
class NewPrefix:
    """A prefix in the pack, and what attention saw of it, for batches to come."""

    prefix: Prefix
    start: int
    layers: PrefixLayers


@dataclass(frozen=True, slots=True)
class Keys:
    """Which tokens the queries of each segment look at, where some look at a prefix too."""

    index: Tensor  # (K,) int64: the tokens, segment by segment; a prefix's once for each segment that follows it
    cu_seqlens: Tensor  # (S + 1,) int32
    max_length: int


@dataclass(frozen=True, slots=True)
class PackShape:
    """The room of a pack that runs as a CUDA graph, which is captured for one shape and replayed for many batches."""

    tokens: int
    rows: int
    """At most; the others are empty."""
    max_length: int
    """Of a row, at most."""

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths fit."""
        return len(lengths) <= self.rows and sum(lengths) <= self.tokens and max(lengths) <= self.max_length


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N rows as S segments of T tokens in all. Segments are rows, the prefixes they share, and a filler.

    With a shape, N and S are what the shape has room for; rows beyond `order` have no meaning, and segments beyond the
    filler are empty.
    """

    memory: Tensor  # (bytes,) uint8: everything below lies in it, so that one copy brings it to the device
    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, restarting at 0 with each row
    token_type_ids: Tensor  # (1, T) int64
    adapters: Tensor  # (T,) int32: the adapter of each token's row, by its index; -1: none
    pooled: Tensor | None  # (T, 1) float32: 0 where a token is left out of pooling; None: all are in
    cu_seqlens: Tensor  # (S + 1,) int32: where each segment starts, and T
    max_length: int
    lengths: Tensor  # (S,) int64
    segments: Tensor  # (N,) int64: the segment of each row
    first: Tensor  # (N,) int64: index of each row's first token that is pooled
    last: Tensor  # (N,) int64: index of each row's last token
    keys: Keys | None
    """None where no row has a prefix: each segment looks at itself."""
    new_prefixes: tuple[NewPrefix, ...]
    """Empty where there is no memory to keep them."""
    recalled: tuple[PrefixLayers, ...]
    """Prefixes computed in an earlier batch; their tokens count from T on."""
    groups: tuple[EqualLengths, ...]
    """For SDPA."""
    at_once: tuple[RowsAtOnce, ...]
    """For products."""
    padded_keys: Tensor | None
    """(P,) int64: the token that each is of, for groups whose keys are padded; None where no group's are. From T on are
    those that were recalled."""
    order: tuple[int, ...]
    """`order[i]` is the caller's index of packed row i."""
    shape: PackShape | None
    attention: Attention
    masks: dict[Hashable, Tensor] = field(default_factory=dict)
    """For SDPA: filled by the first layer that needs one, read by the others."""
    plans: dict[Hashable, object] = field(default_factory=dict)
    """For products: the memory of attention, which all layers use."""
    bands: dict[Hashable, tuple[Tensor, int]] = field(default_factory=dict)
    """For SDPA on a CPU: the tensor that masks are parts of, and the column of its first query's own key."""


@dataclass(slots=True)  # not frozen: that makes one take three times as long, and there is one for each row
class _Segment:
    token_ids: TokenIds
    start: int
    position: int = 0
    prefix: tuple[int, int] | None = None
    index: int | None = None
    """The caller's index of the row; None for a prefix and the filler."""
    unpooled: int = 0
    second_text: int | None = None
    adapter: int | None = None
    shared: Prefix | None = None
    """The prefix that this segment holds; None for a row and the filler."""

    def __len__(self) -> int:
        return len(self.token_ids)


def pack(
    rows: Sequence[Row],
    device: torch.device,
    memory: PrefixMemory | None = None,
    shape: PackShape | None = None,
    attention: Attention = Attention.SDPA,
) -> PackedBatch:
    """Pack rows for one forward pass: those without a prefix by length, then each prefix and what follows it.

    A prefix that `memory` recalls is not in the pack. `shape` must hold the rows, and none of them may have a prefix.
    On CUDA everything is copied at once from pinned memory, on the current stream, and nobody waits for it.
    """
    recalled = _recalled(rows, memory) if memory is not None else {}
    segments = _segments(rows, recalled, shape)
    lengths = np.array([len(segment.token_ids) for segment in segments], dtype=np.int64)
    cu_seqlens = _cumulative(lengths)
    starts, tokens = cu_seqlens[:-1].astype(np.int64), int(cu_seqlens[-1])
    of_rows = np.array([number for number, segment in enumerate(segments) if segment.index is not None], dtype=np.int64)
    unpooled = np.array([segment.unpooled for segment in segments], dtype=np.int64)
    positions = np.array([segment.position for segment in segments], dtype=np.int64)
    keys = _keys(segments)
    groups = _groups(segments, lengths)
    if attention is Attention.PRODUCTS and tokens < max(LEAST_FOR_PRODUCTS, LEAST_OF_A_ROW * len(segments)):
        attention = Attention.SDPA
    padded_keys: Array | None = None
    if attention is Attention.SDPA and device.type == "cpu":
        groups, padded_keys = _with_padded_keys(groups)
    arrays: dict[str, Array] = {
        "input_ids": np.concatenate([segment.token_ids for segment in segments], dtype=np.int64)[None],
        "position_ids": (np.arange(tokens) + np.repeat(positions - starts, lengths))[None],
        "token_type_ids": _token_types(segments, tokens)[None],
        "adapters": np.repeat(np.array([_adapter(segment) for segment in segments], dtype=np.int32), lengths),
        "cu_seqlens": cu_seqlens,
        "lengths": lengths,
        "segments": of_rows,
        # A row of which nothing is pooled begins with its first token.
        "first": (starts + np.where(unpooled < lengths, unpooled, 0))[of_rows],
        "last": (starts + lengths - 1)[of_rows],
    }
    if shape is not None or unpooled.any():
        arrays["pooled"] = _pooled(segments, tokens)
    if keys is not None:
        arrays |= {"keys": keys[0], "keys_cu_seqlens": keys[1]}
    if padded_keys is not None:
        arrays["padded_keys"] = padded_keys
    if shape is not None:
        arrays |= _padded(arrays, shape)
    whole, tensors = _to_device(arrays, device)
    return PackedBatch(
        memory=whole,
        input_ids=tensors["input_ids"],
        position_ids=tensors["position_ids"],
        token_type_ids=tensors["token_type_ids"],
        adapters=tensors["adapters"],
        pooled=tensors.get("pooled"),
        cu_seqlens=tensors["cu_seqlens"],
        max_length=shape.max_length if shape is not None else int(lengths.max()),
        lengths=tensors["lengths"],
        segments=tensors["segments"],
        first=tensors["first"],
        last=tensors["last"],
        keys=Keys(tensors["keys"], tensors["keys_cu_seqlens"], int(np.diff(keys[1]).max())) if keys else None,
        new_prefixes=tuple(
            NewPrefix(segment.shared, segment.start, PrefixLayers())
            for segment in segments
            if segment.shared is not None and memory is not None
        ),
        recalled=tuple(recalled.values()),
        groups=groups,
        at_once=_rows_at_once(groups) if attention is Attention.PRODUCTS else (),
        padded_keys=tensors.get("padded_keys"),
        order=tuple(segment.index for segment in segments if segment.index is not None),
        shape=shape,
        attention=attention,
    )


Array = np.typing.NDArray[np.generic]
ALIGNED = 16  # bytes


def _to_device(arrays: Mapping[str, Array], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """One piece of memory on the device, and the arrays as tensors in it."""
    starts: dict[str, int] = {}
    size = 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // ALIGNED) * ALIGNED
    buffer = np.zeros(size, dtype=np.uint8)
    for name, array in arrays.items():
        buffer[starts[name] : starts[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    host = torch.from_numpy(buffer)
    if device.type == "cuda" and torch.cuda.is_available():
        host = host.pin_memory()  # from pageable memory a copy would wait for all that was launched before
    whole = host.to(device, non_blocking=True)
    return whole, {
        name: whole.narrow(0, starts[name], array.nbytes).view(TORCH_TYPES[array.dtype.name]).view(array.shape)
        for name, array in arrays.items()
    }


TORCH_TYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


def _padded(arrays: Mapping[str, Array], shape: PackShape) -> dict[str, Array]:
    """The arrays with an entry for each row or segment, padded to the numbers of rows and segments of the shape."""
    segments = shape.rows + 1  # and the filler
    return {
        "cu_seqlens": _pad(arrays["cu_seqlens"], segments + 1, shape.tokens),
        "lengths": _pad(arrays["lengths"], segments, 0),
        **{name: _pad(arrays[name], shape.rows, 0) for name in ("segments", "first", "last")},
    }


def _pad(array: Array, length: int, value: int) -> Array:
    padded = np.full(length, value, dtype=array.dtype)
    padded[: len(array)] = array
    return padded


def _recalled(rows: Sequence[Row], memory: PrefixMemory) -> dict[Prefix, PrefixLayers]:
    prefixes = dict.fromkeys(row.prefix for row in rows if row.prefix is not None)
    return {prefix: layers for prefix in prefixes if (layers := memory.recall(prefix)) is not None}


def _segments(rows: Sequence[Row], recalled: Collection[Prefix], shape: PackShape | None) -> list[_Segment]:
    families: dict[Prefix | None, list[int]] = {}
    for index, row in enumerate(rows):
        families.setdefault(row.prefix, []).append(index)
    spans = _recalled_spans(rows, families, recalled)
    lengths = [len(row.token_ids) for row in rows]
    segments: list[_Segment] = []
    start = 0
    for prefix in sorted(families, key=lambda prefix: prefix is not None):  # stable: in order of first appearance
        if prefix is not None and prefix not in spans:
            spans[prefix] = (start, len(prefix))
            segments.append(_Segment(prefix.token_ids, start, shared=prefix))
            start += len(prefix)
        span = spans[prefix] if prefix is not None else None
        for index in sorted(families[prefix], key=lengths.__getitem__):
            row = rows[index]
            position = len(prefix) if prefix else 0
            of_row = (row.unpooled, row.second_text, row.adapter)
            segments.append(_Segment(row.token_ids, start, position, span, index, *of_row))
            start += len(row.token_ids)
    if filler := (_filler(start) if shape is None else shape.tokens - start):
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
    step = 16 if tokens <= 256 else 32 if tokens <= 1024 else 64
    return -tokens % step


def _cumulative(lengths: Sequence[int] | np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _token_types(segments: Sequence[_Segment], tokens: int) -> np.typing.NDArray[np.int64]:
    types = np.zeros(tokens, dtype=np.int64)
    for segment in segments:
        if segment.second_text is not None:
            types[segment.start + segment.second_text : segment.start + len(segment)] = 1
    return types


def _adapter(segment: _Segment) -> int:
    return -1 if segment.adapter is None else segment.adapter


def _pooled(segments: Sequence[_Segment], tokens: int) -> np.typing.NDArray[np.float32]:
    pooled = np.ones((tokens, 1), dtype=np.float32)
    for segment in segments:
        pooled[segment.start : segment.start + segment.unpooled] = 0
    return pooled


def _keys(segments: Sequence[_Segment]) -> tuple[np.typing.NDArray[np.int64], np.typing.NDArray[np.int32]] | None:
    """The tokens that each segment looks at, and where each segment's begin; None where each looks at itself alone."""
    if all(segment.prefix is None for segment in segments):
        return None
    parts = []
    for segment in segments:
        own = np.arange(segment.start, segment.start + len(segment))
        first, length = segment.prefix or (0, 0)
        parts.append(np.concatenate((np.arange(first, first + length), own)))
    return np.concatenate(parts), _cumulative([len(part) for part in parts])


def _groups(segments: Sequence[_Segment], lengths: np.typing.NDArray[np.int64]) -> tuple[EqualLengths, ...]:
    """Neighbours of equal length and prefix."""
    groups = []
    changes = (np.flatnonzero(np.diff(lengths)) + 1).tolist()
    for first, stop in pairwise([0, *changes, len(segments)]):
        neighbours = segments[first:stop]
        for prefix, members in groupby(neighbours, key=attrgetter("prefix")):
            same = list(members)
            groups.append(EqualLengths(same[0].start, len(same), len(same[0]), prefix))
    return tuple(groups)


@lru_cache
def scores_at_once() -> int:
    """How many of a query's scores attention's kernel takes at once on this CPU; 0 where padding keys gains nothing.

    It takes those that are left over one by one, each in about the time of 16. With AVX2 they are 7 at most, and
    padding costs as much; with AVX-512 they are up to 15, which doubles attention's time.
    """
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0


def keys_at_once(keys: int) -> int:
    """So many keys, or the next multiple of `scores_at_once` where at least half of that would be left over."""
    vector = scores_at_once()
    return -(-keys // vector) * vector if vector and 2 * (keys % vector) >= vector else keys


def _with_padded_keys(groups: Sequence[EqualLengths]) -> tuple[tuple[EqualLengths, ...], Array | None]:
    """Pad keys as `keys_at_once` says.

    A row is padded with its own last token. Padding is not seen, but a masked value that is not finite still spoils the
    row: another row's must not be there.

    Returns:
        The groups, and `PackedBatch.padded_keys`.
    """
    with_keys, parts, start = [], [], 0
    for group in groups:
        prefix, before = group.prefix or (0, 0)
        count = keys_at_once(before + group.length)
        if count > before + group.length:
            own = np.minimum(np.arange(count - before), group.length - 1)
            index = (group.start + group.length * np.arange(group.rows))[:, None] + own
            of_prefix = np.broadcast_to(np.arange(prefix, prefix + before), (group.rows, before))
            parts.append(np.concatenate((of_prefix, index), axis=1).reshape(-1))
            group, start = replace(group, padded=(start, count)), start + group.rows * count
        with_keys.append(group)
    return tuple(with_keys), np.concatenate(parts) if parts else None


# A batch with fewer tokens, or fewer for each row, is computed by torch's kernel: preparing products for a short search
# takes longer than they save, and of very short rows most would be padding.
LEAST_FOR_PRODUCTS, LEAST_OF_A_ROW = 64, 8
# Rows that are computed together are padded to the longest of them. That is done where it takes less time than another
# call, which costs as much as so many scores of one head.
CALL_IN_SCORES = 8_192
# oneDNN keeps what it prepares for each shape, 0.7 MB. There are few shapes: the number of rows is a power of two, and
# lengths are padded.
MOST_ROWS_AT_ONCE, MOST_KEYS_AT_ONCE = 64, 2_048


def _rows_at_once(groups: Sequence[EqualLengths]) -> tuple[RowsAtOnce, ...]:
    found: list[RowsAtOnce] = []
    for before, same in groupby(groups, key=attrgetter("before")):
        members = sorted(same, key=attrgetter("length"))  # a filler comes last in a pack
        lengths = [_padded_length(group.length) for group in members for _ in range(group.rows)]
        found += _cut(members, _counts(lengths, before), before)
    return tuple(found)


def _padded_length(tokens: int) -> int:
    """The next multiple of 16, and of 32 above 256 tokens, of 64 above 512, and so on."""
    step = 16
    while step * 16 < tokens:
        step *= 2
    return -(-tokens // step) * step


def _counts(lengths: Sequence[int], before: int) -> list[int]:
    """How many neighbours to compute together, from the first row on, so that all take the least time.

    Args:
        lengths: padded, of each row, in ascending order.
        before: keys of each row's prefix.
    """
    costs, last = [0], [0]  # of the first rows: what they take, and how many of them the last call has
    for stop, length in enumerate(lengths, 1):
        keys = before + length
        most = max(1, min(stop, MOST_ROWS_AT_ONCE, MOST_KEYS_AT_ONCE // keys))
        choices = (1 << power for power in range(most.bit_length()))
        cost, count = min((costs[stop - count] + CALL_IN_SCORES + count * length * keys, count) for count in choices)
        costs.append(cost)
        last.append(count)
    counts, stop = [], len(lengths)
    while stop:
        counts.append(last[stop])
        stop -= last[stop]
    return counts[::-1]


def _cut(groups: Sequence[EqualLengths], counts: Sequence[int], before: int) -> Iterator[RowsAtOnce]:
    """Divide groups so that each call has as many rows as `counts` says."""
    left = list(reversed(groups))
    for count in counts:
        taken: list[EqualLengths] = []
        while wanted := count - sum(group.rows for group in taken):
            group = left.pop()
            if group.rows > wanted:
                left.append(replace(group, start=group.start + wanted * group.length, rows=group.rows - wanted))
                group = replace(group, rows=wanted)
            taken.append(group)
        longest = taken[-1].length
        yield RowsAtOnce(tuple(taken), count, _padded_length(longest), _padded_length(before + longest), before)
