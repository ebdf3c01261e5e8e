"""The inputs of the models, how they are run, and how many operations that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from benchmarks.models.builds import matmul_parameters
from benchmarks.models.shapes import Shape
from torch import Tensor

from vecmill.core.types import Prefix, Row, TokenIds, Vector
from vecmill.engine.forward import Launched, collect
from vecmill.models.networks import Model
from vecmill.models.packed_attention import attention_on
from vecmill.models.packing import pack

CAUSAL = {"llama", "qwen3", "qwen3-reranker"}
DISENTANGLED = {"deberta-v2"}
SEED = 26
BEFORE_DOCUMENT = 39 + 22 + 20  # Qwen3-Reranker's prompt, the instruction and what is around it, a query
AFTER_DOCUMENT = 9


def run_model(model: Model, packs: Sequence[Sequence[Row]], device: torch.device) -> Tensor:
    """(N, width) on the CPU in the rows' order: what the server's engine does for each batch."""
    attention = attention_on(device, next(model.modules[0].parameters()).dtype)
    parts = []
    for rows in packs:
        packed = pack(rows, device, attention=attention)
        answers = model.forward(packed).cpu()
        restored = torch.empty_like(answers)
        restored[torch.tensor(packed.order)] = answers
        parts.append(restored)
    return torch.cat(parts)


def answers_of(launched: Launched) -> list[Vector]:
    """Of each row of a batch, once the device has them.

    Raises:
        Exception: why a row has none.
    """
    answers = []
    for answer in collect(launched):
        if isinstance(answer, Exception):
            raise answer
        answers.append(answer)
    return answers


def operations(kind: str, model: Model, shape: Shape, packs: Sequence[Sequence[Row]]) -> float:
    """Floating-point operations of the packs' forward passes: linear layers and attention."""
    # ALBERT's layers are one that runs several times.
    again: int = shape["num_hidden_layers"] // len(model.layers) - 1
    parameters = matmul_parameters(model.modules) + again * matmul_parameters(model.layers)
    head_width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    # The products of a query with a key and of a weight with a value; with disentangled positions also those of query
    # and key with the distance.
    per_pair: int = (8 if kind in DISENTANGLED else 4) * shape["num_attention_heads"] * head_width
    layers = Counter(windows(model, shape["num_hidden_layers"]))
    return sum(
        2.0 * parameters * computed_tokens(rows)
        + per_pair
        * sum(times * attended(rows, causal=kind in CAUSAL, window=window) for window, times in layers.items())
        for rows in packs
    )


def windows(model: Model, layers: int) -> list[int | None]:
    """Of each layer, how many keys up to its own a query sees, as transformers' layers say it; None: all."""
    found: dict[int, int | None] = {}
    for module in model.modules[0].modules():
        layer, window = getattr(module, "layer_idx", None), getattr(module, "sliding_window", None)
        if layer is not None:
            found[layer] = found.get(layer) or window
    return [found.get(layer) for layer in range(layers)]


MEDIAN_TOKENS, LOG_DEVIATION = 95, 0.792  # of functions and classes: a mean of 130 tokens, some much longer
SHORTEST, LONGEST = 8, 512


def reranker_rows(documents: int, document_tokens: int, vocab_size: int) -> list[TokenIds]:
    """The tokens of one query's pairs; they differ from the document's first token on."""
    random = np.random.default_rng(SEED)
    before, after = (random.integers(vocab_size, size=size) for size in (BEFORE_DOCUMENT, AFTER_DOCUMENT))
    firsts = random.permutation(vocab_size)[:documents]
    return [
        np.concatenate((before, [first], random.integers(vocab_size, size=document_tokens - 1), after)).astype(np.int32)
        for first in firsts
    ]


def ragged_rows(texts: int, vocab_size: int, longest: int = LONGEST) -> list[TokenIds]:
    """Random tokens in the lengths of code, cut at `longest`."""
    random = np.random.default_rng(SEED)
    lengths = np.exp(random.normal(np.log(MEDIAN_TOKENS), LOG_DEVIATION, size=texts)).clip(SHORTEST, longest)
    return [random.integers(vocab_size, size=int(length)).astype(np.int32) for length in lengths]


def first_tokens(rows: Sequence[TokenIds], tokens: int) -> list[Row]:
    """As many of the rows as hold exactly so many tokens; the last one is cut."""
    kept: list[Row] = []
    for row in rows:
        if not tokens:
            break
        kept.append(Row(row[:tokens]))
        tokens -= len(kept[-1])
    return kept


def equal_rows(tokens: int, longest: int, vocab_size: int) -> list[TokenIds]:
    """Random tokens, cut into rows of `longest`."""
    ids = np.random.default_rng(SEED).integers(vocab_size, size=tokens).astype(np.int32)
    return [ids[start : start + longest] for start in range(0, tokens, longest)]


def batches(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """The rows in their order, as many in each batch as there is room for."""
    groups: list[list[Row]] = [[]]
    for row in rows:
        if groups[-1] and sum(map(len, groups[-1])) + len(row) > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def computed_tokens(rows: Sequence[Row]) -> int:
    """Tokens that one forward pass computes; a prefix counts once."""
    return sum(len(row.token_ids) for row in rows) + sum(len(prefix) for prefix in _prefixes(rows))


def attended(rows: Sequence[Row], *, causal: bool, window: int | None = None) -> int:
    """The number of pairs of a token and a token that it attends to.

    `window`: how many tokens up to its own it attends to at most, and from there on where attention is not causal.
    """
    if not causal:
        return sum(2 * _pairs(len(row), window) - len(row) for row in rows)
    spans = [(len(row), len(row.prefix) if row.prefix else 0) for row in rows]
    spans += [(len(prefix), 0) for prefix in _prefixes(rows)]
    return sum(_pairs(whole, window) - _pairs(before, window) for whole, before in spans)


def _pairs(tokens: int, window: int | None) -> int:
    """How many pairs there are if each token attends to `window` tokens at most: itself and those before it."""
    within = tokens if window is None else min(window, tokens)
    return within * (within + 1) // 2 + (tokens - within) * within


def _prefixes(rows: Sequence[Row]) -> set[Prefix]:
    return {row.prefix for row in rows if row.prefix is not None}


def with_shared_prefix(rows: Sequence[TokenIds]) -> list[Row]:
    """Rows that share their common leading tokens as one prefix; each keeps at least one token of its own."""
    longest = min(map(len, rows)) - 1
    same = np.all([row[:longest] == rows[0][:longest] for row in rows], axis=0)
    common = longest if same.all() else int(same.argmin())
    prefix = Prefix(rows[0][:common])
    return [Row(row[common:], prefix=prefix) for row in rows]
