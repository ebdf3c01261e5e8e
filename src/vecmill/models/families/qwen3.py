"""Qwen3-Embedding 0.6B, 4B and 8B: the hidden state of the last token.

Source: Zhang et al. 2025 (https://arxiv.org/abs/2506.05176); https://huggingface.co/Qwen/Qwen3-Embedding-0.6B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.pooling import pool
from vecmill.models.weights import Target, load_weights, make_config

HEADS = ("lm_head.", "score.")


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
    config = make_config(Qwen3Config, checkpoint, {**checkpoint.architecture, "use_cache": False})
    return load_weights(Qwen3Model, checkpoint, config, target, _rename), config


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
    return () if name.startswith(HEADS) else (name.removeprefix("model."),)
