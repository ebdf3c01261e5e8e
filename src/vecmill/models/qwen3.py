"""Qwen3-Embedding 0.6B, 4B and 8B: the hidden state of the last token.

Source: Zhang et al. 2025 (https://arxiv.org/abs/2506.05176); https://huggingface.co/Qwen/Qwen3-Embedding-0.6B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from vecmill.core.errors import StartupError
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.pooling import pool
from vecmill.models.weights import Target, load_weights

SLIDING = "sliding_attention"
LAYER_TYPES = {"full_attention", SLIDING}


class Qwen3Embedder:
    """A packed causal forward pass."""

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load the weights. Raises StartupError where any is missing or unknown."""
        self.backbone, config = load_backbone(checkpoint, target)
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self._pooling = checkpoint.require_pooling()

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self.backbone,)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self.backbone).layers)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, width) float32, pooled and not normalised, in packed order."""
        return pool(decode(self.backbone, packed, use_flash_attn), packed, self._pooling)


def load_backbone(checkpoint: Checkpoint, target: Target) -> tuple[nn.Module, Qwen3Config]:
    """The decoder without its head. Raises StartupError where a weight is missing or unknown."""
    config = Qwen3Config(**{**checkpoint.config, "use_cache": False})
    check_windows(checkpoint, config)
    return load_weights(Qwen3Model, checkpoint, config, target, _rename), config


def check_windows(checkpoint: Checkpoint, config: Qwen3Config) -> None:
    """Raise StartupError where layers are of another kind, or have a sliding window without a width."""
    kinds, width = config.layer_types, config.sliding_window
    if unknown := set(kinds) - LAYER_TYPES:
        raise StartupError(
            f"{checkpoint.named}: config.json has {', '.join(sorted(unknown))} in layer_types; supported are "
            f"{', '.join(sorted(LAYER_TYPES))}."
        )
    if SLIDING in kinds and (width is None or width < 1):
        raise StartupError(
            f"{checkpoint.named}: config.json has layers with a sliding window, and sliding_window={width!r} with "
            f"use_sliding_window={config.use_sliding_window!r}; at least 1 and true are supported."
        )


def decode(backbone: nn.Module, packed: PackedBatch, use_flash_attn: bool) -> Tensor:
    """(T, width) hidden states after the last norm."""
    hidden: Tensor = backbone(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        packed_batch=packed,
        use_flash_attn=use_flash_attn,
    ).last_hidden_state[0]
    return hidden


def _rename(name: str) -> Sequence[str]:
    """Embedders are stored under the base model's names, rerankers under the causal model's; the head is not used."""
    return () if name.startswith("lm_head.") else (name.removeprefix("model."),)
