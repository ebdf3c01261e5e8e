"""BERT and XLM-R encoders (MiniLM, bge-*-v1.5, bge-m3, e5, gte): one vector per text.

Source: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805), Conneau et al. 2020 (https://arxiv.org/abs/1911.02116);
Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084) for the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.pooling import pool
from vecmill.models.weights import Target, load_weights, make_config

CLASSES = {"bert": (BertConfig, BertModel), "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel)}
# What checkpoints carry of pre-training; an encoder's own pooler is trained for next-sentence prediction.
UNUSED = ("pooler.", "embeddings.position_ids", "cls.", "lm_head.")


class BertEmbedder:
    """A packed forward pass through a BERT or XLM-R encoder."""

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load the weights. Raises StartupError where any is missing or unknown."""
        config_class, model_class = CLASSES[checkpoint.model_type]
        config: Any = make_config(config_class, checkpoint, checkpoint.architecture)
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self._pooling = checkpoint.require_pooling()
        self._padding = padding_with_a_place(config)
        self.encoder = load_weights(model_class, checkpoint, config, target, rename, add_pooling_layer=False)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self.encoder,)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self.encoder).encoder.layer)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, width) float32, pooled and not normalised, in packed order."""
        return pool(encode(self.encoder, packed, self._padding, use_flash_attn), packed, self._pooling)


def encode(encoder: nn.Module, packed: PackedBatch, padding: int | None, use_flash_attn: bool) -> Tensor:
    """(T, width) hidden states of the last layer. `padding` as of `padding_with_a_place`."""
    hidden: Tensor = encoder(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids if padding is None else positions(packed, padding),
        token_type_ids=packed.token_type_ids,
        packed_batch=packed,
        use_flash_attn=use_flash_attn,
    ).last_hidden_state[0]
    return hidden


def padding_with_a_place(config: Any) -> int | None:
    """XLM-R's id of padding, which the positions are counted around (fairseq's convention); None for other models."""
    return int(config.pad_token_id) if config.model_type == "xlm-roberta" else None


def positions(packed: PackedBatch, padding: int) -> Tensor:
    """(1, T) XLM-R's positions: they begin after the padding's id, and padding written in a text is not counted.

    Such a token has the padding's own position, as transformers computes it.
    """
    index = torch.arange(packed.position_ids.shape[1], device=packed.position_ids.device)
    is_padding = packed.input_ids[0] == padding
    before = torch.cumsum(is_padding, 0) - is_padding.long()
    of_row = before - before[index - packed.position_ids[0]]
    counted = packed.position_ids[0] - of_row + padding + 1
    return torch.where(is_padding, padding, counted)[None]


def rename(name: str) -> Sequence[str]:
    """Names with or without the model's own prefix, and TensorFlow's names for the layer norms."""
    name = name.removeprefix("bert.").removeprefix("roberta.")
    if name.startswith(UNUSED):
        return ()
    return (layer_norm_name(name),)


def layer_norm_name(name: str) -> str:
    """TensorFlow's names for the weights of a layer norm, as torch has them."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
