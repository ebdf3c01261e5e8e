"""Attention on a CPU as matrix products of many heads and rows at once.

torch's own kernel multiplies blocks of 32 to 64 queries of one head, and where a CPU has no instructions for tiles of a
matrix (AMX) most of its time goes to what is around them. Here oneDNN multiplies all heads of rows of about one length
in one call, and softmax needs no pass for the largest score: the weights are 2 to the power of the scores, and the
second product is divided by their sum.

A sum that is very large or very small says that weights are beyond what bfloat16 holds: such a row is computed by
torch's kernel. Scores are rounded to bfloat16, as by transformers' `eager` attention, which moves a weight by up to
0.2 % for each unit of its score, and by as much again where a bias of two parts is added; torch's kernel does not round
them.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vecmill.core.errors import first_line, is_out_of_memory
from vecmill.core.types import Row
from vecmill.models.cpu_kernels import (
    CpuKernels,
    Gather,
    Numbers,
    Places,
    Scatter,
    Weigh,
    cpu_kernels,
    fastest_in_one_thread,
    in_one_thread,
    torch_threads,
)
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

Bias = Callable[[Tensor, Tensor, int], Sequence[Tensor]]
"""(heads, rows, queries, head_dim) and (heads, rows, keys, head_dim), and the first query's place in its row, to what
is added to their scores: one or two parts, (heads, rows, queries, keys) of which padding may be left out. Of the first
the keys are next to each other in memory, of the second the queries.
"""


@dataclass(frozen=True, slots=True)
class _Range:
    """The queries of each row, and the keys, that are multiplied in one call."""

    first: int
    queries: int
    begin: int
    """The first key; before `end`."""
    end: int
    diagonals: tuple[int | None, int | None]
    """Of the scores, the first and the last on which keys are seen; None: no limit."""


class _Memory:
    """What the rows of a batch are multiplied in, one after the other."""

    def __init__(self, query: Tensor, key: Tensor, largest: Sequence[int], sums: int, *, compiled: bool) -> None:
        """`largest`: values of all keys, of all values, of a block's queries and of its scores."""
        self.kv_heads, self.width = key.shape[1], query.shape[3]
        self.heads_of_each = query.shape[1] // self.kv_heads
        whole = query.new_zeros(sum(largest))
        self._keys, self._values, self._query, self._scores = torch.split(whole, list(largest))
        self._sums = torch.zeros(sums, dtype=torch.float32 if compiled else query.dtype, device=query.device)
        self._used = 0
        self.nbytes = whole.nbytes + self._sums.nbytes

    def keys_and_values(self, rows: int, keys: int) -> tuple[Tensor, Tensor]:
        """(kv_heads, rows, keys, head_dim) each."""
        shape = (self.kv_heads, rows, keys, self.width)
        return _view(self._keys, shape), _view(self._values, shape)

    def block(self, rows: int, taken: _Range, keys: Tensor, values: Tensor) -> _Block:
        """One of these keys and values, and sums of its own."""
        by_head = (self.kv_heads, rows, self.heads_of_each, taken.queries)
        used, self._used = self._used, self._used + math.prod(by_head)
        return _Block(
            taken,
            _view(self._query, (*by_head, self.width)),
            _view(self._scores, (*by_head, taken.end - taken.begin)),
            self._sums[used : self._used].view(by_head),
            keys.flatten(0, 1).transpose(1, 2),
            values.flatten(0, 1),
        )

    @property
    def used_sums(self) -> Tensor:
        """Blocks that would be padding alone have none."""
        return self._sums[: self._used]


class _Block:
    """What is multiplied in one call."""

    def __init__(
        self, taken: _Range, query: Tensor, scores: Tensor, sums: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        self.taken = taken
        self.query = query  # (kv_heads, rows, heads of each, queries, head_dim); in the end what they attend to
        self.scores = scores  # (kv_heads, rows, heads of each, queries, keys)
        self.sums = sums  # (kv_heads, rows, heads of each, queries)
        self._keys, self._values = keys, values  # (kv_heads * rows, head_dim, keys), (kv_heads * rows, keys, head_dim)
        # (kv_heads * rows, heads of each * queries, head_dim) and (..., keys)
        self._queries, self._scores = (each.flatten(0, 1).flatten(1, 2) for each in (query, scores))

    def score(self, factor: float, beta: float) -> None:
        """Add `factor` times the products of queries and keys to `beta` times what is in the place of the scores."""
        torch.baddbmm(self._scores, self._queries, self._keys, beta=beta, alpha=factor, out=self._scores)

    def sum_values(self) -> None:
        """Put the values, each times its weight, in the place of the queries."""
        torch.bmm(self._scores, self._values, out=self._queries)


class _Rows(ABC):
    """Rows of about one length, and how they are multiplied.

    Values of a row's padding are zero: zero times a value that is not finite would spoil the row. Keys of the padding
    are what was there before, and so are their scores until their weights are set to zero.
    """

    keys: Tensor
    """(kv_heads, rows, keys, head_dim)"""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, factor: float, bias: Bias | None, out: Tensor) -> None:
        """Write what the rows' queries attend to, of (1, heads, T, head_dim) into the same of `out`.

        Weights are 2 to the power of `factor` times the products, and LOG2_E times the biases.
        """

    @abstractmethod
    def out_of_range(self) -> Iterator[tuple[EqualLengths, Sequence[bool]]]:
        """Groups of rows, and whether each row has a sum that is."""

    def biases(self, bias: Bias | None, block: _Block) -> Sequence[Tensor]:
        """Of a block whose queries and keys are in their place."""
        return () if bias is None else bias(block.query[:, :, 0], self.keys, block.taken.first)


@dataclass(slots=True)
class _GroupQueries:
    """The queries of one group in a block. All by head: (kv_heads, rows, heads of each, count, ...)."""

    group: EqualLengths
    first: int
    count: int
    query: Tensor  # (..., head_dim)
    sums: Tensor  # (..., 1)


@dataclass(slots=True)
class _TorchBlock:
    """A block, and the parts of it that belong to each group or are padding."""

    block: _Block
    groups: list[_GroupQueries] = field(default_factory=list)
    padded_scores: list[Tensor] = field(default_factory=list)
    """Of keys that are padding."""
    padded_sums: list[Tensor] = field(default_factory=list)
    """Of queries that are padding."""


class _TorchRows(_Rows):
    """With torch's operations, which share their work out among threads."""

    def __init__(self, memory: _Memory, at_once: RowsAtOnce, ranges: Iterable[_Range], window: Window) -> None:
        self._at_once, self._kv_heads = at_once, memory.kv_heads
        self.keys, self._values = memory.keys_and_values(at_once.count, at_once.keys)
        self._blocks: list[_TorchBlock] = []
        for taken in ranges:
            keys = slice(taken.begin, taken.end)
            block = memory.block(at_once.count, taken, self.keys[:, :, keys], self._values[:, :, keys])
            self._blocks.append(self._with_parts(block, window))

    def _with_parts(self, block: _Block, window: Window) -> _TorchBlock:
        made, taken = _TorchBlock(block), block.taken
        for group, which in self._groups():
            count = max(0, min(group.length - taken.first, taken.queries))
            if count:
                of_group = (block.query[:, which, :, :count], block.sums[:, which, :, :count, None])
                made.groups.append(_GroupQueries(group, taken.first, count, *of_group))
            if count < taken.queries:
                made.padded_sums.append(block.sums[:, which, :, count:])
            seen = max(0, self._at_once.before + group.length - taken.begin)
            if seen < block.scores.shape[4] and window[1] != 0:  # what comes later is not seen anyway
                made.padded_scores.append(block.scores[:, which, :, :, seen:])
        return made

    def _groups(self) -> Iterator[tuple[EqualLengths, slice]]:
        """And which rows each has here."""
        row = 0
        for group in self._at_once.groups:
            yield group, slice(row, row + group.rows)
            row += group.rows

    def attend(self, query: Tensor, key: Tensor, value: Tensor, factor: float, bias: Bias | None, out: Tensor) -> None:
        self._place(key, value)
        for each in self._blocks:
            block = each.block
            for part in each.groups:
                part.query.copy_(_by_head(query, part.group, part.first, part.count, self._kv_heads))
            beta = self._write(self.biases(bias, block), block.scores)
            block.score(factor, beta)
            self._weigh(each)
            block.sum_values()
            for part in each.groups:
                into = _by_head(out, part.group, part.first, part.count, self._kv_heads)
                torch.div(part.query, part.sums, out=into)

    def _place(self, key: Tensor, value: Tensor) -> None:
        before = self._at_once.before
        for group, which in self._groups():
            after = before + group.length
            for tensor, into in ((key, self.keys), (value, self._values)):
                if group.prefix is not None:
                    first, count = group.prefix
                    into[:, which, :before].copy_(tensor[0, :, None, first : first + count])
                into[:, which, before:after].copy_(group.of(tensor).transpose(0, 1))
            if after < self._at_once.keys:
                self._values[:, which, after:].zero_()

    def _write(self, biases: Sequence[Tensor], scores: Tensor) -> float:
        """Write biases for products to be added to; returns how many times they are to be added."""
        if not biases:
            return 0.0
        _, _, queries, keys = biases[0].shape
        into = scores[:, :, 0, :queries, :keys]
        into.copy_(biases[-1])  # torch is fast at copying what is transposed, and slow at adding it
        for bias in biases[:-1]:
            into.add_(bias)
        return LOG2_E

    def _weigh(self, each: _TorchBlock) -> None:
        block = each.block
        first, last = block.taken.diagonals
        weights = block.scores.exp2_()
        if last is not None:
            weights.tril_(last)
        if first is not None:
            weights.triu_(first)
        for padding in each.padded_scores:
            padding.zero_()
        torch.sum(weights, -1, out=block.sums)
        for padding in each.padded_sums:
            padding.fill_(1)  # is in range

    def out_of_range(self) -> Iterator[tuple[EqualLengths, Sequence[bool]]]:
        for group, which in self._groups():
            bad = torch.zeros(group.rows, dtype=torch.bool)
            for block in (each.block for each in self._blocks):
                sums = block.sums[:, which, :, : max(0, group.length - block.taken.first)]
                bad |= ~((sums >= LEAST_SUM) & (sums <= MOST_SUM)).all(-1).all(-1).all(0)
            yield group, bad.tolist()


@dataclass(slots=True)
class _CompiledBlock:
    """A block, and its steps in the order that they run in."""

    block: _Block
    keys: Sequence[Gather]
    """Empty where they are those of the block before; so with the values."""
    values: Sequence[Gather]
    query: Gather
    weigh: Weigh
    scatter: Scatter


class _CompiledRows(_Rows):
    """With compiled steps, in one thread."""

    def __init__(self, kernels: CpuKernels, memory: _Memory, at_once: RowsAtOnce, ranges: Iterable[_Range]) -> None:
        self._kernels, self._at_once = kernels, at_once
        self.keys, _ = memory.keys_and_values(at_once.count, at_once.keys)
        rows = [(group, row) for group in at_once.groups for row in range(group.rows)]
        column = partial(np.fromiter, dtype=np.int64, count=len(rows))
        self._tokens: Numbers = column(group.start + row * group.length for group, row in rows)
        self._lengths: Numbers = column(group.length for group, _ in rows)
        self._prefixes: Numbers = column(0 if group.prefix is None else group.prefix[0] for group, _ in rows)
        self._bad = np.zeros(at_once.count, dtype=np.uint8)
        """Which rows have a sum that is out of range, in the layer that was computed last."""
        self._blocks: list[_CompiledBlock] = []
        placed = None
        for taken in ranges:
            self._blocks.append(self._prepared(memory, taken, placed == (taken.begin, taken.end)))
            placed = taken.begin, taken.end

    def _prepared(self, memory: _Memory, taken: _Range, placed: bool) -> _CompiledBlock:
        """`placed`: whether the block before has the same keys."""
        before, width = self._at_once.before, taken.end - taken.begin
        keys, values = memory.keys_and_values(self._at_once.count, width)
        block = memory.block(self._at_once.count, taken, keys, values)
        queries = Places(self._tokens + taken.first, np.clip(self._lengths - taken.first, 0, taken.queries))
        ends = before + self._lengths
        seen = Places(self._tokens, np.clip(ends - taken.begin, 0, width))
        own = max(before, taken.begin)  # the first key that is a row's own
        own_keys = Places(self._tokens + own - before, np.clip(ends - own, 0, taken.end - own))
        of_prefix = max(0, own - taken.begin)
        prefix = Places(self._prefixes + taken.begin, np.full_like(ends, of_prefix))

        def gathers(into: Tensor, *, clear: bool) -> list[Gather]:
            slots = into[:, :, None]
            made = [Gather(self._kernels, prefix, slots)] if of_prefix else []
            return [*made, Gather(self._kernels, own_keys, slots[:, :, :, of_prefix:], clear=clear)]

        in_range, diagonals = (LEAST_SUM, MOST_SUM), taken.diagonals
        scored = (block.scores, block.sums, self._bad, queries, seen, diagonals, in_range, LOG2_E)
        return _CompiledBlock(
            block,
            [] if placed else gathers(keys, clear=False),
            [] if placed else gathers(values, clear=True),
            Gather(self._kernels, queries, block.query),
            Weigh(self._kernels, *scored),
            Scatter(self._kernels, block.query, block.sums, queries),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, factor: float, bias: Bias | None, out: Tensor) -> None:
        self._bad.fill(0)
        for each in self._blocks:
            for gather in each.keys:
                gather(key)
            for gather in each.values:
                gather(value)
            each.query(query)
            biases = self.biases(bias, each.block)
            each.block.score(factor, 0.0)
            each.weigh(biases)
            each.block.sum_values()
            each.scatter(out)

    def out_of_range(self) -> Iterator[tuple[EqualLengths, Sequence[bool]]]:
        if not self._bad.any():
            return
        row, bad = 0, self._bad.astype(bool).tolist()
        for group in self._at_once.groups:
            yield group, bad[row : row + group.rows]
            row += group.rows


class _Plan:
    """How the rows of a batch are multiplied, in each layer in the same memory."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        at_once: Sequence[RowsAtOnce],
        window: Window,
        most_queries: int,
        kernels: CpuKernels | None,
    ) -> None:
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        self._compiled = kernels is not None
        steps = [_step(rows, heads, window, most_queries) for rows in at_once]
        sizes = [
            (rows.keys * kv_heads * width, step * heads * width, step * heads * rows.keys, rows.queries * heads)
            for rows, step in zip(at_once, steps, strict=True)
        ]
        keys, queries, scores, sums = zip(
            *([rows.count * size for size in each] for rows, each in zip(at_once, sizes, strict=True)), strict=True
        )
        largest = max(keys), max(keys), max(queries), max(scores)
        self.memory = _Memory(query, key, largest, sum(sums), compiled=self._compiled)
        self.rows: list[_Rows] = [
            _TorchRows(self.memory, rows, _ranges(rows, step, window), window)
            if kernels is None
            else _CompiledRows(kernels, self.memory, rows, _ranges(rows, step, window))
            for rows, step in zip(at_once, steps, strict=True)
        ]

    def out_of_range(self) -> Iterator[EqualLengths]:
        """The rows that have a sum which is; neighbours of a group together."""
        if not self._compiled:
            least, most = torch.aminmax(self.memory.used_sums)  # one operation for nearly all batches
            if least.item() >= LEAST_SUM and most.item() <= MOST_SUM:  # neither holds where one is not a number
                return
        for group, found in (each for rows in self.rows for each in rows.out_of_range()):
            first = 0
            for bad, neighbours in groupby(found):
                count = len(list(neighbours))
                if bad:
                    yield EqualLengths(group.start + first * group.length, count, group.length, group.prefix)
                first += count


def _step(rows: RowsAtOnce, heads: int, window: Window, most_queries: int) -> int:
    """How many queries of each row a block has."""
    fitting = SCORES // (rows.count * heads * rows.keys)
    step = min(MOST_QUERIES, max(LEAST_QUERIES, 1 << max(1, fitting).bit_length() - 1))
    left, right = window
    if left >= 0:
        step = min(step, max(QUERIES_IN_A_WINDOW, 2 * left))
    elif right == 0:
        step = min(step, QUERIES_IN_A_WINDOW)
    return min(step, rows.queries, most_queries)


def _ranges(rows: RowsAtOnce, step: int, window: Window) -> Iterator[_Range]:
    """Of blocks of `step` queries, without those that would be padding alone."""
    left, right = window
    for first in range(0, max(group.length for group in rows.groups), step):
        queries = min(step, rows.queries - first)
        own = rows.before + first  # the first query's own key
        begin = max(0, own - left) // ALIGNED_KEYS * ALIGNED_KEYS if left >= 0 else 0
        end = min(rows.keys, -(-(own + queries + right) // ALIGNED_KEYS) * ALIGNED_KEYS) if right >= 0 else rows.keys
        first_diagonal = own - begin - left if left >= 0 and own + queries - 1 - left > begin else None
        last_diagonal = own - begin + right if right >= 0 and own + right < end - 1 else None
        yield _Range(first, queries, begin, end, (first_diagonal, last_diagonal))


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
    kernels = in_one_thread(cpu_kernels()) if query.dtype is torch.bfloat16 else None
    known = (query.shape, key.shape, query.dtype, window, most_queries, kernels)
    plan = packed.plans.get(known)
    if plan is None:
        plan = packed.plans[known] = _Plan(query, key, packed.at_once, window, most_queries, kernels)
    assert isinstance(plan, _Plan)
    factor = LOG2_E * (scaling if scaling is not None else query.shape[3] ** -0.5)
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
    for rows in plan.rows:
        rows.attend(query, key, value, factor, bias, out)
    for group in plan.out_of_range():
        group.of(out).copy_(by_kernel(group))
    return out.transpose(1, 2)


@lru_cache
def are_faster() -> bool:
    """Whether this is faster than torch's kernel on this machine, and gives the same: found out by trying."""
    try:
        return _gain() >= GAIN
    except Exception as error:  # products of this type are not to be had in many ways
        if is_out_of_memory(error):  # says nothing of them: the next load tries again
            raise
        logger.info("attention stays as torch has it: products cannot be used here: %s", first_line(error)[:160])
        return False


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

    with torch_threads(1):  # with the steps that most passes have
        given, wanted = products(), kernel()
    if not (given - wanted).norm() <= MOST_OFF * wanted.norm():
        logger.info("attention stays as torch has it: products give other numbers here")
        return 0.0
    by_kernel, by_products = fastest_in_one_thread((kernel, products), TRIALS)
    return by_kernel / by_products
