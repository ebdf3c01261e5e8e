"""Attention on a CPU as matrix products of many heads and rows at once.

torch's own kernel multiplies blocks of 32 to 64 queries of one head, and where a CPU has no instructions for tiles of a
matrix (AMX) most of its time goes to what is around them. Here oneDNN multiplies all heads of rows of about one length
in one call, and softmax needs no pass for the largest score: the weights are 2 to the power of the scores, and the
second product is divided by their sum.

A sum that is very large or very small says that weights are beyond what bfloat16 holds: such a row is computed by
torch's kernel. Scores are rounded to bfloat16, as by transformers' `eager` attention, which moves a weight by up to
0.2 % for each unit of its score; torch's kernel does not round them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vecmill.core.errors import first_line, is_out_of_memory
from vecmill.core.types import Row
from vecmill.models.packing import EVERYTHING, Attention, EqualLengths, PackedBatch, RowsAtOnce, Window, pack

logger = logging.getLogger(__name__)

LOG2_E = math.log2(math.e)

# Sums of weights that are in range: bfloat16 holds 2 ** -126 to 2 ** 128. Weights that are too small for it do not
# matter beside the smallest sum, and values of up to 2 ** 23 times the largest sum still fit.
LEAST_SUM, MOST_SUM = 2.0**-100, 2.0**104

# A row's queries are taken in blocks of about so many scores, 4 MB.
SCORES, LEAST_QUERIES, MOST_QUERIES = 2 << 20, 64, 512
# Where a query does not see all keys, a block has so many queries, or twice the window: fewer keys are multiplied that
# none of them sees.
QUERIES_IN_A_WINDOW = 128
# The keys of a block begin and end at multiples of this, so that there are few shapes.
ALIGNED_KEYS = 16

# What the trial computes, some rows in the shape of BERT-base, and how often. It takes some 20 ms.
TRIAL_ROWS, TRIAL_TOKENS, TRIAL_HEADS, TRIAL_HEAD_DIM = 4, 128, 12, 64
TRIALS, GAIN = 7, 1.25
MOST_OFF = 0.02  # two roundings to bfloat16; a kernel that computes something else is far off

Bias = Callable[[Tensor, Tensor, int, Tensor], None]
"""(heads, rows, queries, head_dim) and (heads, rows, keys, head_dim), the first query's place in its row, and where to
write what is added to their scores: (heads, rows, queries, keys). Padding may be left as it is.
"""


@dataclass(slots=True)
class _GroupQueries:
    """The queries of one group in a block. All by head: (kv_heads, rows, heads of each, count, ...)."""

    group: EqualLengths
    first: int
    count: int
    query: Tensor  # (..., head_dim); in the end the values that they attend to
    sums: Tensor  # (..., 1)


@dataclass(slots=True)
class _Block:
    """What is multiplied in one call."""

    first: int
    query: Tensor  # (kv_heads * rows, heads of each * queries, head_dim)
    keys: Tensor  # (kv_heads * rows, head_dim, keys)
    values: Tensor  # (kv_heads * rows, keys, head_dim)
    scores: Tensor  # (kv_heads * rows, heads of each * queries, keys)
    sums: Tensor  # (kv_heads * rows, heads of each * queries)
    query_by_head: Tensor  # (kv_heads, rows, heads of each, queries, head_dim)
    scores_by_head: Tensor  # (kv_heads, rows, heads of each, queries, keys)
    last_diagonal: int | None
    """Of the scores, the last on which keys are seen; None: they are seen up to the end."""
    first_diagonal: int | None
    """The first on which they are; None: they are seen from the beginning."""
    parts: list[_GroupQueries] = field(default_factory=list)
    padded_scores: list[Tensor] = field(default_factory=list)
    """Of keys that are padding."""
    padded_sums: list[Tensor] = field(default_factory=list)
    """Of queries that are padding."""

    def place(self, query: Tensor) -> None:
        """Bring its queries, of (1, heads, T, head_dim), to where they are multiplied."""
        for part in self.parts:
            part.query.copy_(_by_head(query, part.group, part.first, part.count, self.query_by_head.shape[0]))

    def multiply(self, factor: float, of_bias: float) -> None:
        """Sum up the weights, and put what they weigh, not divided yet, in the place of the queries.

        The weights are 2 to the power of `factor` times the products and `of_bias` times what the scores hold already.
        """
        torch.baddbmm(self.scores, self.query, self.keys, beta=of_bias, alpha=factor, out=self.scores)
        weights = self.scores.exp2_()
        if self.last_diagonal is not None:
            self.scores_by_head.tril_(self.last_diagonal)
        if self.first_diagonal is not None:
            self.scores_by_head.triu_(self.first_diagonal)
        for padding in self.padded_scores:
            padding.zero_()
        torch.sum(weights, -1, out=self.sums)
        for padding in self.padded_sums:
            padding.fill_(1)  # is in range
        torch.bmm(weights, self.values, out=self.query)

    def divide_into(self, out: Tensor) -> None:
        """Divide by the sums, into (1, heads, T, head_dim)."""
        for part in self.parts:
            into = _by_head(out, part.group, part.first, part.count, self.query_by_head.shape[0])
            torch.div(part.query, part.sums, out=into)


@dataclass(slots=True)
class _PlacedRows:
    """Rows of about one length, and where they are multiplied."""

    at_once: RowsAtOnce
    keys: Tensor  # (kv_heads, rows, keys, head_dim)
    values: Tensor
    blocks: list[_Block] = field(default_factory=list)

    def place(self, key: Tensor, value: Tensor) -> None:
        """Bring keys and values to where they are multiplied.

        Values of the padding are zero: zero times a value that is not finite would spoil the row. Keys of the padding
        are what was there before, and so are their scores until their weights are set to zero.
        """
        row, before = 0, self.at_once.before
        for group in self.at_once.groups:
            which = slice(row, row + group.rows)
            row, after = row + group.rows, before + group.length
            for tensor, into in ((key, self.keys), (value, self.values)):
                if group.prefix is not None:
                    first, count = group.prefix
                    into[:, which, :before].copy_(tensor[0, :, None, first : first + count])
                into[:, which, before:after].copy_(group.of(tensor).transpose(0, 1))
            if after < self.at_once.keys:
                self.values[:, which, after:].zero_()


class _Plan:
    """The memory of a batch's attention, which its rows use one after the other in each layer, and the views of it."""

    def __init__(
        self, query: Tensor, key: Tensor, at_once: Sequence[RowsAtOnce], window: Window, most_queries: int
    ) -> None:
        self._window, self._width = window, query.shape[3]
        self._kv_heads, self._heads_of_each = key.shape[1], query.shape[1] // key.shape[1]
        steps = [self._step(rows, most_queries) for rows in at_once]
        sizes = zip(*(self._sizes(rows, step) for rows, step in zip(at_once, steps, strict=True)), strict=True)
        sums = sum(rows.count * query.shape[1] * rows.queries for rows in at_once)
        pieces = [*map(max, sizes), sums]
        self._keys, self._values, self._query, self._scores, self.sums = torch.split(
            query.new_zeros(sum(pieces)), pieces
        )
        self._used = 0
        self.rows = [self._of(rows, step) for rows, step in zip(at_once, steps, strict=True)]
        self.sums = self.sums[: self._used]  # blocks that would be padding alone are not computed

    def _step(self, rows: RowsAtOnce, most_queries: int) -> int:
        """How many queries of each row a block has."""
        fitting = SCORES // (rows.count * self._kv_heads * self._heads_of_each * rows.keys)
        step = min(MOST_QUERIES, max(LEAST_QUERIES, 1 << max(1, fitting).bit_length() - 1))
        left, right = self._window
        if left >= 0:
            step = min(step, max(QUERIES_IN_A_WINDOW, 2 * left))
        elif right == 0:
            step = min(step, QUERIES_IN_A_WINDOW)
        return min(step, rows.queries, most_queries)

    def _sizes(self, rows: RowsAtOnce, step: int) -> tuple[int, int, int, int]:
        """Of keys, values, queries and scores."""
        batch = rows.count * self._kv_heads
        keys, queries = batch * rows.keys * self._width, batch * self._heads_of_each * step
        return keys, keys, queries * self._width, queries * rows.keys

    def _of(self, rows: RowsAtOnce, step: int) -> _PlacedRows:
        shape = (self._kv_heads, rows.count, rows.keys, self._width)
        made = _PlacedRows(rows, _view(self._keys, shape), _view(self._values, shape))
        longest = max(group.length for group in rows.groups)
        for first in range(0, longest, step):
            made.blocks.append(self._block(made, first, min(step, rows.queries - first)))
        return made

    def _block(self, of: _PlacedRows, first: int, queries: int) -> _Block:
        rows, (left, right) = of.at_once, self._window
        own = rows.before + first  # the first query's own key
        begin = max(0, own - left) // ALIGNED_KEYS * ALIGNED_KEYS if left >= 0 else 0
        end = min(rows.keys, -(-(own + queries + right) // ALIGNED_KEYS) * ALIGNED_KEYS) if right >= 0 else rows.keys
        batch, grouped, keys = self._kv_heads * rows.count, self._heads_of_each * queries, end - begin
        by_head = (self._kv_heads, rows.count, self._heads_of_each, queries)
        query = _view(self._query, (batch, grouped, self._width))
        scores = _view(self._scores, (batch, grouped, keys))
        sums = self.sums[self._used : self._used + batch * grouped].view(batch, grouped)
        self._used += batch * grouped
        block = _Block(
            first,
            query,
            of.keys.flatten(0, 1)[:, begin:end].transpose(1, 2),
            of.values.flatten(0, 1)[:, begin:end],
            scores,
            sums,
            query.view(*by_head, self._width),
            scores.view(*by_head, keys),
            own - begin + right if right >= 0 and own + right < end - 1 else None,
            own - begin - left if left >= 0 and own + queries - 1 - left > begin else None,
        )
        row = 0
        for group in rows.groups:
            which = slice(row, row + group.rows)
            row += group.rows
            count = max(0, min(group.length - first, queries))
            if count:
                part = (block.query_by_head[:, which, :, :count], sums.view(*by_head, 1)[:, which, :, :count])
                block.parts.append(_GroupQueries(group, first, count, *part))
            if count < queries:
                block.padded_sums.append(sums.view(*by_head)[:, which, :, count:])
            seen = max(0, rows.before + group.length - begin)
            if seen < keys and right != 0:  # what comes later is not seen anyway
                block.padded_scores.append(block.scores_by_head[:, which, :, :, seen:])
        return block

    def out_of_range(self) -> Iterator[EqualLengths]:
        """The rows that have a sum which is; neighbours of a group together."""
        least, most = torch.aminmax(self.sums)  # one operation for nearly all batches
        if least.item() >= LEAST_SUM and most.item() <= MOST_SUM:  # neither holds where one is not a number
            return
        found: dict[EqualLengths, Tensor] = {}
        for part in (part for rows in self.rows for block in rows.blocks for part in block.parts):
            in_range = ((part.sums >= LEAST_SUM) & (part.sums <= MOST_SUM)).all(-1).all(-1).all(-1).all(0)
            found[part.group] = found.get(part.group, in_range) & in_range
        for group, in_range in found.items():
            first = 0
            for fine, neighbours in groupby(in_range.tolist()):
                rows = len(list(neighbours))
                if not fine:
                    yield EqualLengths(group.start + first * group.length, rows, group.length, group.prefix)
                first += rows


def _view(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _by_head(tensor: Tensor, group: EqualLengths, first: int, count: int, kv_heads: int) -> Tensor:
    """Tokens of a group, (1, heads, T, head_dim) -> (kv_heads, rows, heads of each, count, head_dim); not a copy."""
    _, heads, _, width = tensor.shape
    _, of_head, of_token, of_value = tensor.stride()
    of_each = heads // kv_heads
    return tensor.as_strided(
        (kv_heads, group.rows, of_each, count, width),
        (of_each * of_head, group.length * of_token, of_head, of_token, of_value),
        tensor.storage_offset() + (group.start + first) * of_token,
    )


def attend(
    query: Tensor,  # (1, heads, T, head_dim)
    key: Tensor,  # (1, kv_heads, T and recalled ones, head_dim)
    value: Tensor,
    packed: PackedBatch,
    scaling: float | None,
    window: Window,
    by_kernel: Callable[[EqualLengths], Tensor],
    bias: Bias | None = None,
    most_queries: int = MOST_QUERIES,
) -> Tensor:
    """Attention within each row and the prefix it follows: (1, T, heads, head_dim).

    Args:
        by_kernel: the same of rows of one length, (rows, heads, length, head_dim), however large their scores are.
        bias: only with as many heads of keys as of queries.
        most_queries: for which `bias` can be asked at once.
    """
    assert value.shape == key.shape
    known = (query.shape, key.shape, query.dtype, window, most_queries)
    plan = packed.plans.get(known)
    if plan is None:
        plan = packed.plans[known] = _Plan(query, key, packed.at_once, window, most_queries)
    assert isinstance(plan, _Plan)
    factor = LOG2_E * (scaling if scaling is not None else query.shape[3] ** -0.5)
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
    for rows in plan.rows:
        rows.place(key, value)
        for block in rows.blocks:
            block.place(query)
            if bias is not None:
                bias(block.query_by_head[:, :, 0], rows.keys, block.first, block.scores_by_head[:, :, 0])
            block.multiply(factor, 0 if bias is None else LOG2_E)
            block.divide_into(out)
    for group in plan.out_of_range():
        group.of(out).copy_(by_kernel(group))
    return out.transpose(1, 2)


@lru_cache
def are_faster() -> bool:
    """Whether this is faster than torch's kernel on this machine, and gives the same: found out by trying."""
    threads = torch.get_num_threads()
    # One thread, as most passes have: where others are busy too, several wait for each other at each step.
    torch.set_num_threads(1)
    try:
        return _gain() >= GAIN
    except Exception as error:  # products of this type are not to be had in many ways
        if is_out_of_memory(error):  # says nothing of them: the next load tries again
            raise
        logger.info("attention stays as torch has it: products cannot be used here: %s", first_line(error)[:160])
        return False
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _gain() -> float:
    """How many times as long torch's kernel takes; 0 where it gives other numbers."""
    rows = [Row(np.ones(TRIAL_TOKENS, dtype=np.int32))] * TRIAL_ROWS
    packed = pack(rows, torch.device("cpu"), attention=Attention.PRODUCTS)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, packed.input_ids.shape[1], TRIAL_HEADS, TRIAL_HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator, device="cpu").bfloat16().transpose(2, 3)

    def products() -> Tensor:
        packed.plans.clear()
        return attend(query, key, value, packed, None, EVERYTHING, lambda group: group.of(query))

    def kernel() -> Tensor:
        (whole,) = packed.groups
        q, k, v = (whole.of(each) for each in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[None]

    if (products() - kernel()).norm() > MOST_OFF * kernel().norm():
        logger.info("attention stays as torch has it: products give other numbers here")
        return 0.0
    seconds: dict[Callable[[], Tensor], list[float]] = {products: [], kernel: []}
    for _ in range(TRIALS):
        for way, taken in seconds.items():
            started = perf_counter()
            way()
            taken.append(perf_counter() - started)
    return min(seconds[kernel]) / min(seconds[products])
