"""The one attention function that every family runs through: sequences packed in one row never see each other.

`transformers_networks` has transformers' classes call it.

For torch.compile attention is one opaque operation: what it does depends on the rows of a batch, so a graph of it would
have to be compiled again for the next batch. The batch reaches the operation through `compiled_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.models import attention_products
from vecmill.models.family import BiasTable
from vecmill.models.packing import EVERYTHING, Attention, EqualLengths, PackedBatch, Window, keys_at_once


# Arguments that not every torch has. torch 2.11 takes neither: its kernel accepts fewer key heads without being told.
# From 2.14 on either one keeps the call off cuDNN, which on H100 and B200 plans anew for each shape. One split: the
# sums of a row are added in the same order whatever it is packed with.
def varlen_options(kernel: Callable[..., Any]) -> dict[str, Any]:
    """Those of the arguments above that a kernel has."""
    wanted = {"enable_gqa": True, "num_splits": 1}
    return {name: value for name, value in wanted.items() if name in signature(kernel).parameters}


@lru_cache
def _varlen() -> Callable[..., Any]:
    """torch's kernel for packed rows. A CPU has none, and the module that has it takes longer to import than torch."""
    kernel: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
    return partial(kernel, **varlen_options(kernel))


LARGEST_FLASH_HEAD = 256  # of flash attention's kernels


def attention_on(
    device: torch.device, dtype: torch.dtype, *, flash: bool = True, timed: bool = True, largest_head: int = 0
) -> Attention:
    """What is to compute attention of weights of a type on a device.

    Args:
        flash: whether the kernel for ragged rows is wanted, and the device has it.
        timed: whether the choice may depend on how long each takes.
        largest_head: values of a head at most.
    """
    if device.type == "cpu":
        faster = timed and dtype is torch.bfloat16 and attention_products.are_faster()
        return Attention.PRODUCTS if faster else Attention.SDPA
    fits = dtype in (torch.float16, torch.bfloat16) and largest_head <= LARGEST_FLASH_HEAD
    return Attention.FLASH if flash and device.type == "cuda" and fits else Attention.SDPA


# Where some scores are masked the queries of a row are taken in blocks of so many: a block has the keys that its
# queries see. In a narrow window a CPU takes fewer, twice as many as a query sees before it: keys that only few queries
# of a block see cost more than another call.
BLOCK_QUERIES, LEAST_BLOCK_QUERIES = 512, 128

# Keys of longer rows are not padded where every query sees all of them: masking the padding takes as long as the keys
# that are left over. With a bias it is masked in a copy of the bias, which is more work.
MASKED_UP_TO, BIASED_UP_TO = 1024, 512


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What attention needs to know of a forward pass."""

    layer: int | None
    """The layer's number; None where no prefix can be recalled."""
    packed_batch: PackedBatch


compiled_call: ContextVar[LayerCall] = ContextVar("compiled_call")
"""Set around each call of a compiled layer, whose graph must not hold any of it."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, head_dim)
    key: Tensor,  # (1, kv_heads, T, head_dim)
    value: Tensor,  # (1, kv_heads, T, head_dim)
    attention_mask: Tensor | None,
    *,
    packed_batch: PackedBatch,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    position_projections: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed row and the prefix it follows. Returns (1, T, heads, head_dim), and no weights.

    `packed_batch.attention` says what computes it; with a bias it is SDPA always, since flash kernels take none.

    Args:
        sliding_window: as transformers' layers say it, so many keys up to the query's own, and as many from there on
            where attention is not causal; None: all.
        position_bias: added to the scores, a table as `bias_table` makes it. Not with a prefix or a window.
        position_projections: (buckets, heads, head_dim) keys and queries, scaled. `position_bias` is then (1, rows, C)
            and names the bucket of each distance; the products of the query with its key, and of the key with its
            query, are added.
    """
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    position = [] if position_bias is None else [position_bias, *(position_projections or ())]
    if torch.compiler.is_compiling():
        return _operation(query, key, value, scaling, causal, sliding_window, position), None
    call = LayerCall(getattr(module, "layer_idx", None), packed_batch)
    return _attend(query, key, value, call, scaling, causal, sliding_window, position), None


@torch.library.custom_op("vecmill::packed_attention", mutates_args=())
def _operation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
    position: Sequence[Tensor],
) -> Tensor:
    call = compiled_call.get()
    return _attend(query, key, value, call, scaling, causal, sliding_window, position).contiguous()


@_operation.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
    position: Sequence[Tensor],
) -> Tensor:
    _, heads, tokens, head_dim = query.shape
    return query.new_empty(1, tokens, heads, head_dim)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: LayerCall,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
    position: Sequence[Tensor],
) -> Tensor:
    """(1, T, heads, head_dim)"""
    packed = call.packed_batch
    if position:
        # A captured pass would go on with the lengths that it was captured with.
        assert packed.shape is None
        assert packed.keys is None
        assert sliding_window is None
        return _biased(query, key, value, packed, scaling, position)
    reach = -1 if sliding_window is None else sliding_window - 1
    window = (reach, 0 if causal else reach)
    key, value = _with_prefixes(call.layer, key, value, packed)
    if packed.attention is Attention.FLASH:
        return _flash(query, key, value, packed, scaling, window)
    if packed.attention is Attention.PRODUCTS:

        def by_kernel(group: EqualLengths) -> Tensor:
            own_keys, own_values = (_own_rows(each, group) for each in (key, value))
            return _sdpa(group.of(query), own_keys, own_values, packed, group, scaling, window)

        return attention_products.attend(query, key, value, packed, scaling, window, by_kernel)
    gains = [_gains(group, window) for group in packed.groups]
    keys_and_values = _key_rows(packed, key, value, gains)
    return _one_row(
        _sdpa(group.of(query), k, v, packed, group, scaling, window)
        for group, (k, v) in zip(packed.groups, keys_and_values, strict=True)
    )


def _gains(group: EqualLengths, window: Window) -> bool:
    """Whether a group's padded keys are used."""
    return group.padded is not None and (
        _narrowest(window, group.length) != EVERYTHING or group.padded[1] <= MASKED_UP_TO
    )


def _key_rows(
    packed: PackedBatch, key: Tensor, value: Tensor, gains: Sequence[bool]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each group, (rows, kv_heads, keys, head_dim); with their padding where the group `gains`."""
    padded: list[Tensor] = []
    if any(gains):
        assert packed.padded_keys is not None
        padded = [_of_tokens(each, packed.padded_keys) for each in (key, value)]
    for group, gain in zip(packed.groups, gains, strict=True):
        k, v = (
            (_padded_rows(each, group) for each in padded)
            if gain
            else (_own_rows(each, group) for each in (key, value))
        )
        yield k, v


def _padded_rows(tensor: Tensor, group: EqualLengths) -> Tensor:
    """(1, kv_heads, P, head_dim) -> (rows, kv_heads, keys and padding, head_dim)"""
    assert group.padded is not None
    start, count = group.padded
    return EqualLengths(start, group.rows, count).of(tensor)


def _own_rows(tensor: Tensor, group: EqualLengths) -> Tensor:
    """(1, kv_heads, T and recalled ones, head_dim) -> (rows, kv_heads, keys, head_dim)"""
    own = group.of(tensor)
    if group.prefix is None:
        return own
    first, length = group.prefix
    return torch.cat((tensor[:, :, first : first + length].expand(group.rows, -1, -1, -1), own), dim=2)


def _one_row(parts: Iterable[Tensor]) -> Tensor:
    """Groups of (rows, heads, length, head_dim) -> (1, T, heads, head_dim)."""
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[None]


def _with_prefixes(layer: int | None, key: Tensor, value: Tensor, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """Note this layer's keys and values of new prefixes; put those of recalled ones after the pack's."""
    for new in packed.new_prefixes:
        own = slice(new.start, new.start + len(new.prefix))
        new.layers.tensors.append((key[:, :, own].clone(), value[:, :, own].clone()))
    if packed.recalled:
        assert layer is not None
        recalled = [layers.tensors[layer] for layers in packed.recalled]
        key = torch.cat([key, *(keys for keys, _ in recalled)], dim=2)
        value = torch.cat([value, *(values for _, values in recalled)], dim=2)
    return key, value


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float | None, window: Window
) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, head_dim)
    cu_keys, max_keys = packed.cu_seqlens, packed.max_length
    if packed.keys is not None:
        # A prefix's keys are copied before each row that follows it; its tokens are still computed only once. The
        # window is aligned at the last key, so each query sees the prefix and its own row up to itself.
        k, v = k[packed.keys.index], v[packed.keys.index]
        cu_keys, max_keys = packed.keys.cu_seqlens, packed.keys.max_length
    out = _varlen()(
        q,
        k,
        v,
        packed.cu_seqlens,
        cu_keys,
        packed.max_length,
        max_keys,
        scale=scaling,
        window_size=_narrowest(window, max_keys),
    )
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out[None]


def _narrowest(window: Window, keys: int) -> Window:
    """The window, with -1 (no limit) for each side that reaches past all of the `keys`."""
    left, right = window
    return -1 if left >= keys - 1 else left, -1 if right and right >= keys - 1 else right


def _sdpa(
    query: Tensor,  # (rows, heads, length, head_dim)
    key: Tensor,  # (rows, kv_heads, keys and padding, head_dim)
    value: Tensor,
    packed: PackedBatch,
    group: EqualLengths,
    scaling: float | None,
    window: Window,
) -> Tensor:
    """(rows, heads, length, head_dim)"""
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    before = group.before
    keys, padded = before + group.length, key.shape[2]
    left, right = window = _narrowest(window, keys)
    if left < 0 and right == 0 and not before:
        return attend(query, key, value, is_causal=True)  # padding comes after every query
    if window == EVERYTHING:
        mask = _mask(packed, (1, padded), 0, window, keys, query) if padded > keys else None
        return attend(query, key, value, attn_mask=mask)
    on_cpu = query.device.type == "cpu"
    step = max(LEAST_BLOCK_QUERIES, min(2 * left, BLOCK_QUERIES)) if on_cpu and left >= 0 else BLOCK_QUERIES
    parts = []
    for start in range(0, group.length, step):
        stop = min(start + step, group.length)
        first = max(0, before + start - left) if left >= 0 else 0
        last = min(keys, before + stop + right) if right >= 0 else keys
        if on_cpu:  # as many keys as the kernel takes well; the mask hides those that are too many
            wanted = keys_at_once(last - first)
            last = min(padded, first + wanted)
            first = max(0, last - wanted)
        mask = _mask(packed, (stop - start, last - first), before + start - first, window, keys - first, query)
        parts.append(attend(query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], attn_mask=mask))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _of_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """(1, heads, T, head_dim) and (P,) -> (1, heads, P, head_dim); a token's heads stay next to each other."""
    return tensor.transpose(1, 2).index_select(1, index).transpose(1, 2)


def _biased(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float | None, position: Sequence[Tensor]
) -> Tensor:
    """(1, T, heads, head_dim)"""
    biases = _Biases(packed, position)
    attend = partial(_sdpa_biased, biases=biases, scaling=scaling)
    if packed.attention is Attention.PRODUCTS:
        return attention_products.attend(
            query,
            key,
            value,
            packed,
            scaling,
            EVERYTHING,
            lambda group: attend(group.of(query), group.of(key), group.of(value)),
            biases.parts,
            biases.most_queries,
        )
    gains = [group.padded is not None and group.length <= BIASED_UP_TO for group in packed.groups]
    return _one_row(
        attend(group.of(query), k, v)
        for group, (k, v) in zip(packed.groups, _key_rows(packed, key, value, gains), strict=True)
    )


def _sdpa_biased(query: Tensor, key: Tensor, value: Tensor, *, biases: _Biases, scaling: float | None) -> Tensor:
    """(rows, heads, length, head_dim); keys may have padding."""
    blocks = []
    for block, start in _blocks(query, biases.most_queries):
        bias = biases.of(block, key[:, :, : query.shape[2]], start, key.shape[2])
        blocks.append(F.scaled_dot_product_attention(block, key, value, attn_mask=bias, scale=scaling))
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]


class _Biases:
    """What is added to the scores of a batch's rows in one layer."""

    def __init__(self, packed: PackedBatch, position: Sequence[Tensor]) -> None:
        """`position`: as `packed_attention` takes it, table and projections."""
        self._packed = packed
        self._table, *projections = position
        self.most_queries = self._table.shape[1]
        self._reach = self._table.shape[2] // 2
        self._products: DistanceProducts | None = None
        if projections:
            longest = max(max(group.length for group in packed.groups), *(rows.keys for rows in packed.at_once), 0)
            self._products = DistanceProducts(self._table, *projections, longest=min(longest, self._reach))

    def of(self, query: Tensor, key: Tensor, start: int, columns: int) -> Tensor:
        """(rows, heads, queries, columns) or (1, ...), -inf in columns after the last key; see `DistanceProducts.of`.

        A table's is kept in the batch where it has such columns: it is the same in all layers.
        """
        if self._products is not None:
            return self._products.of(query, key, start, columns)
        queries, keys = query.shape[2], key.shape[2]
        # With four dimensions: of three a CPU's kernel makes all scores first, and takes twice as long.
        bias = self._of_table(queries, keys, start)[None]
        if columns == keys:
            return bias
        masks, known = self._packed.masks, (queries, keys, start, columns)
        if known not in masks:
            masks[known] = F.pad(bias, (0, columns - keys), value=-torch.inf)
        return masks[known]

    def parts(self, query: Tensor, key: Tensor, start: int) -> Sequence[Tensor]:
        """As `attention_products` asks for them; rows may be padded beyond what the table reaches."""
        keys = min(key.shape[2], self._reach)
        queries = min(query.shape[2], keys - start)
        if self._products is None:
            return (self._of_table(queries, keys, start)[:, None].expand(-1, query.shape[1], -1, -1),)
        return self._products.both(query[:, :, :queries], key[:, :, :keys], start)

    def _of_table(self, queries: int, keys: int, start: int) -> Tensor:
        """Of so many queries from `start` on and of a row's keys: (heads, queries, keys)."""
        first = self._reach - start
        return self._table[:, :queries, first : first + keys]


def _blocks(query: Tensor, step: int) -> Iterator[tuple[Tensor, int]]:
    """(rows, heads, length, head_dim) in parts of `step` queries, and the first query of each."""
    return ((query[:, :, start : start + step], start) for start in range(0, query.shape[2], step))


class DistanceProducts:
    """What queries score with the keys of distances, and keys with the queries of distances, in one layer.

    A product has one column for each distance, in order. The next query's distances begin one column earlier: read as
    if its rows were one value shorter, the product has one column for each key, and no pair's distance is looked up.
    Source: the relative shift of Transformer-XL (https://arxiv.org/abs/1901.02860, appendix B).
    """

    def __init__(self, table: Tensor, keys: Tensor, queries: Tensor, *, longest: int) -> None:
        """`longest`: tokens of the longest row; the others as `packed_attention` takes them."""
        center = table.shape[2] // 2
        buckets = table[0, 0, center - longest + 1 : center + longest]  # of the distances 1 - longest to longest - 1
        self._longest = longest
        self._keys = keys.transpose(0, 1).index_select(1, buckets)  # (heads, distances, head_dim)
        self._queries = queries.transpose(0, 1).index_select(1, buckets.flip(0))

    def of(self, query: Tensor, key: Tensor, start: int, columns: int) -> Tensor:
        """What is added to the scores: (rows, heads, queries, columns), -inf in columns after the last key.

        Args:
            query: (rows, heads, queries, head_dim), of which the first is the row's query `start`.
            key: (rows, heads, length, head_dim), all of the row's.
        """
        of_query, of_key = (
            each.transpose(0, 1) for each in self.both(query.transpose(0, 1), key.transpose(0, 1), start)
        )
        rows, heads, count, length = of_query.shape
        if columns == length:
            return of_query + of_key
        bias = query.new_full((rows, heads, count, columns), -torch.inf)
        torch.add(of_query, of_key, out=bias[..., :length])
        return bias

    def both(self, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The two parts of the sum, (heads, rows, queries, length), of tensors with heads before rows."""
        heads, rows, count, _ = query.shape
        length = key.shape[2]
        distances = count + length - 1
        first = self._longest - start - count
        by_query = _products(query, self._keys[:, first : first + distances])
        first = self._longest - length + start
        by_key = _products(key, self._queries[:, first : first + distances])
        size = (heads, rows, count, length)
        return (
            by_query.as_strided(size, (rows * count * distances, count * distances, distances - 1, 1), count - 1),
            by_key.as_strided(size, (rows * length * distances, length * distances, 1, distances - 1), length - 1),
        )


def _products(tokens: Tensor, distances: Tensor) -> Tensor:
    """(heads, rows, length, head_dim) and (heads, distances, head_dim) -> (heads, rows * length, distances)."""
    return torch.bmm(tokens.flatten(1, 2), distances.transpose(1, 2))


def bias_table(of_distances: Callable[[Tensor], Tensor], positions: int, device: torch.device) -> Tensor:
    """What attention adds for each distance of a key from its query, laid out so that any row's bias is a part of it.

    Row r and column c hold the bias of the key that is c - C / 2 - r tokens after its query. So the bias of a row of T
    tokens is the first T rows from column C / 2 on, and that of its queries from q on begins q columns earlier. Nothing
    is computed or copied in a forward pass.

    Args:
        of_distances: (D,) int64 distances, key less query, to (heads, D) values, or (1, D) buckets.
        positions: tokens of the longest row.

    Returns:
        (heads, rows, C) of the type that `of_distances` gives, in the shape that `BiasTable` says.
    """
    least = of_distances(torch.zeros(1, dtype=torch.int64, device=device))
    _, rows, columns = BiasTable(len(least), positions).shape(least.element_size())
    reach = columns // 2
    values = of_distances(torch.arange(1 - rows - reach, reach, device=device))
    return values.unfold(1, columns, 1).flip(1).contiguous()


def _mask(packed: PackedBatch, shape: tuple[int, int], first: int, window: Window, keys: int, query: Tensor) -> Tensor:
    """(queries, keys) of the query's type, which is added to the scores: 0 where a query sees a key, -inf elsewhere.

    Kept in the batch for the next layers. SDPA would make the same of a mask of booleans, at every call.

    Args:
        first: the key that belongs to the first query.
        keys: from this one on they are padding.
    """
    queries, columns = shape
    padding = keys < columns and window[1] != 0  # what comes later is not seen anyway
    known = (shape, first, window, keys if padding else columns, query.dtype)
    if known in packed.masks:
        return packed.masks[known]
    if query.device.type != "cpu":  # CUDA's kernels want a mask that is aligned, so none is a part of another
        packed.masks[known] = _seen(queries, first, columns - first, window, query)
        return packed.masks[known]
    band, before = _band(packed, (queries, first, columns - first), window, query)
    mask = band[:queries, before - first : before - first + columns]
    if padding:
        mask = packed.masks[known] = mask.clone()
        mask[:, keys:] = -torch.inf
    return mask


def _band(packed: PackedBatch, least: tuple[int, int, int], window: Window, query: Tensor) -> tuple[Tensor, int]:
    """A mask that holds those of all blocks of a window: whether a query sees a key depends on their distance alone.

    Returns it with the column of the first query's own key. `least`: rows, columns before that one, and columns from
    there on.
    """
    found = packed.bands.get((window, query.dtype))
    have = (0, 0, 0) if found is None else (len(found[0]), found[1], found[0].shape[1] - found[1])
    if found is None or any(size > known for size, known in zip(least, have, strict=True)):
        # Powers of two, so that it does not grow with each group: they are in the order of their lengths.
        rows, before, after = (
            1 << (max(size, known, 1) - 1).bit_length() for size, known in zip(least, have, strict=True)
        )
        found = packed.bands[window, query.dtype] = _seen(rows, before, after, window, query), before
    return found


def _seen(rows: int, before: int, after: int, window: Window, query: Tensor) -> Tensor:
    """(rows, before + after), 0 where a query sees a key; the first one's own is in column `before`."""
    left, right = window
    seen = torch.ones(rows, before + after, dtype=torch.bool, device=query.device)
    seen = seen.tril(before + right) if right >= 0 else seen
    seen = seen.triu(before - left) if left >= 0 else seen
    unseen = torch.full(seen.shape, -torch.inf, dtype=query.dtype, device=query.device)
    return unseen.masked_fill_(seen, 0.0)
