"""BERT encoders (MiniLM, bge-*-v1.5, e5, gte): one vector per text.

Source: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805); Reimers and Gurevych 2019 for the pooling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packed_attention import ATTENTION
from vecmill.models.packing import PackedBatch
from vecmill.models.pooling import pool
from vecmill.models.weights import load_weights

# A BertModel's own pooler is trained for next-sentence prediction; embedding models pool by themselves.
UNUSED_WEIGHTS = ("pooler.", "embeddings.position_ids", "cls.")


class BertEmbedder:
    """A packed forward pass through a BERT encoder."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Load the weights. Raises StartupError where any is missing or unknown."""
        config = BertConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        self.dimensions: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self._pooling = checkpoint.pooling
        self._encoder = load_weights(
            BertModel,
            checkpoint,
            config,
            dtype=dtype,
            device=device,
            unused=UNUSED_WEIGHTS,
            attn_implementation=ATTENTION,
            add_pooling_layer=False,
        )

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._encoder.parameters())

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, dimensions) float32, pooled and not normalised, in packed order."""
        hidden = self._encoder(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            token_type_ids=torch.zeros_like(packed.input_ids),
            packed_batch=packed,
            use_flash_attn=use_flash_attn,
        ).last_hidden_state[0]
        return pool(hidden, packed, self._pooling)
