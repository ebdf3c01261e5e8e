"""NV-Embed-v2: a Mistral that looks both ways, latent attention over its hidden states, a mean without the instruction.

Source: Lee et al. 2024 (https://arxiv.org/abs/2405.17428); https://huggingface.co/nvidia/NV-Embed-v2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import MistralConfig, MistralModel

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.config_keys import NV_EMBED_TEXT
from vecmill.models.keys import honoured
from vecmill.models.latent_attention import LATENT_PREFIX, LatentAttention
from vecmill.models.packing import PackedBatch
from vecmill.models.pooling import mean
from vecmill.models.weights import Target, WeightFiles, load_weights, make_config

BACKBONE_PREFIX = "embedding_model."


class NVEmbedder:
    """A packed bidirectional forward pass and the folded latent attention."""

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load and fold the weights. Raises StartupError where any is missing or unknown."""
        text_config = honoured(checkpoint.config["text_config"], NV_EMBED_TEXT)
        del text_config["model_type"]
        as_reference = {"sliding_window": None, "use_cache": False}
        config = make_config(MistralConfig, checkpoint, {**text_config, **as_reference})
        config.is_causal = False
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self._backbone = load_weights(MistralModel, checkpoint, config, target, _rename)
        latent_config = checkpoint.config.get("latent_attention_config") or {}
        self._latent_attention = LatentAttention.fold(WeightFiles(checkpoint), latent_config, target)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self._backbone, self._latent_attention)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self._backbone).layers)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, width) float32, pooled and not normalised, in packed order."""
        hidden = self._backbone(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            packed_batch=packed,
            use_flash_attn=use_flash_attn,
        ).last_hidden_state[0]
        return mean(self._latent_attention(hidden), packed)


def _rename(name: str) -> Sequence[str]:
    return () if name.startswith(LATENT_PREFIX) else (name.removeprefix(BACKBONE_PREFIX),)
