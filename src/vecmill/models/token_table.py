"""A table of token vectors without a transformer (StaticEmbedding, model2vec): a text's vector is their mean.

Source: sentence-transformers 6.2, StaticEmbedding; https://github.com/MinishLab/model2vec for `mapping` and `weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.weights import Target, WeightFiles

OWN, MODEL2VEC = "embedding.weight", "embeddings"
MAPPING, WEIGHTS = "mapping", "weights"
INTEGERS = ("I64", "I32", "I16", "U8")


@dataclass(frozen=True, slots=True)
class TableConfig:
    """What other models' configurations say: the sizes of the table."""

    vocab_size: int
    hidden_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """From the header of the weights. Raises StartupError where they hold no table."""
        files = WeightFiles(checkpoint)
        name = _table(files)
        shape = files.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise files.unfit(f"{name} has the shape {tuple(shape)}, which is no table")
        mapped = name == MODEL2VEC and MAPPING in files.files
        return cls(_length(files, MAPPING) if mapped else shape[0], shape[1])


class TokenTable(nn.Module):
    """Token ids of packed rows -> (N, width) float32: their means."""

    layers: Sequence[nn.Module] = ()
    """There are none."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.vocab_size = len(weight)

    @classmethod
    def load(cls, checkpoint: Checkpoint, target: Target) -> Self:
        """The table on the target's device, model2vec's weights of tokens multiplied into it.

        Raises:
            StartupError: a tensor is missing, unknown, of another shape, or not finite.
        """
        TableConfig.of(checkpoint)  # checks the shapes
        files = WeightFiles(checkpoint)
        name = _table(files)
        files.refuse_unknown("", (name,) if name == OWN else (name, MAPPING, WEIGHTS))
        table = files.part(name)
        if name == MODEL2VEC:
            table = _fold(files, table)
        target.progress(checkpoint.weight_bytes)
        return cls(table.to(target.device, target.dtype))

    def forward(self, packed: PackedBatch) -> Tensor:
        """(N, width) float32, in packed order; the sums of rows do not depend on each other."""
        starts = packed.cu_seqlens.long()
        means = F.embedding_bag(packed.input_ids[0], self.weight, starts, mode="mean", include_last_offset=True)
        return means[packed.segments].float()


def _table(files: WeightFiles) -> str:
    return OWN if OWN in files.files or MODEL2VEC not in files.files else MODEL2VEC


def _length(files: WeightFiles, name: str) -> int:
    shape = files.shape(name)
    if len(shape) != 1 or not shape[0]:
        raise files.unfit(f"{name} has the shape {tuple(shape)}, which is no list")
    return shape[0]


def _fold(files: WeightFiles, table: Tensor) -> Tensor:
    """One row for each token: the row that `mapping` names, times the token's weight."""
    if MAPPING in files.files:
        rows = _mapping(files)
        if rows.min() < 0 or rows.max() >= len(table):
            raise files.unfit(f"{MAPPING} names rows that {MODEL2VEC} does not have")
        table = table[rows]
    if WEIGHTS in files.files:
        if _length(files, WEIGHTS) != len(table):
            raise files.unfit(f"{WEIGHTS} has the shape {tuple(files.shape(WEIGHTS))} instead of ({len(table)},)")
        table = table * files.part(WEIGHTS)[:, None]
    return table


def _mapping(files: WeightFiles) -> Tensor:
    with safe_open(files.files[MAPPING], framework="pt") as opened:
        stored = opened.get_slice(MAPPING)
        if stored.get_dtype() not in INTEGERS:
            raise files.unfit(f"{MAPPING} is no list of whole numbers")
        rows: Tensor = opened.get_tensor(MAPPING)
    files.note(MAPPING, rows)
    return rows.long()
