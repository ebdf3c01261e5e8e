"""The families that are served, by the `model_type` in their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vecmill.core.errors import StartupError
from vecmill.models.bert import BertEmbedder
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch


class Embedder(Protocol):
    """A loaded embedding model."""

    @property
    def dimensions(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, dimensions) float32, pooled and not normalised, in packed order."""
        ...


class EmbedderClass(Protocol):
    """A family."""

    def __call__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Embedder: ...


EMBEDDERS: Mapping[str, EmbedderClass] = {"bert": BertEmbedder}


def family(checkpoint: Checkpoint) -> EmbedderClass:
    """The class that runs a checkpoint.

    Raises:
        StartupError: no family here has this model_type.
    """
    if checkpoint.model_type not in EMBEDDERS:
        raise StartupError(
            f"EMBED_MODEL={checkpoint.id}: model_type {checkpoint.model_type!r} is not supported; "
            f"supported: {', '.join(sorted(EMBEDDERS))}."
        )
    return EMBEDDERS[checkpoint.model_type]
