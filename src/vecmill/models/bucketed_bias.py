"""MPNet's layers on packed rows: attention with a bias for each distance of two tokens, which all layers share.

transformers' own class computes the bias for all pairs of tokens that it is given, which would be a whole pack, and
does not run through its attention interface. So its weights run here. Distances are put into buckets as T5 does it.

Sources: Song et al. 2020 (https://arxiv.org/abs/2004.09297); Raffel et al. 2019 (https://arxiv.org/abs/1910.10683).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from vecmill.models.packed_attention import bias_table, packed_attention
from vecmill.models.packing import PackedBatch


class PositionBias(nn.Module):
    """What every layer adds to its scores."""

    table: Tensor
    """As `bias_table` makes it, of the weights' type."""

    def __init__(self, embedding: Any, positions: int) -> None:
        """`embedding`: of buckets, (buckets, heads)."""
        super().__init__()
        weight: Tensor = embedding.weight.detach()

        def of_distances(distances: Tensor) -> Tensor:
            return weight[MPNetEncoder.relative_position_bucket(distances)].T

        self.register_buffer("table", bias_table(of_distances, positions, weight.device), persistent=False)


class BiasedLayer(nn.Module):
    """Attention with a bias, then the feed-forward layer, each followed by its norm."""

    def __init__(self, layer: Any, bias: PositionBias) -> None:
        """Take over what `layer`, an MPNetLayer of transformers, is made of."""
        super().__init__()
        attention = layer.attention.attn
        self.head_dim: int = attention.attention_head_size
        self.scaling = self.head_dim**-0.5
        self.qkv = _merged([attention.q, attention.k, attention.v])
        self.o: nn.Module = attention.o
        self.norm: nn.Module = layer.attention.LayerNorm
        self.intermediate: nn.Module = layer.intermediate
        self.output: nn.Module = layer.output
        self.bias = bias

    def forward(self, hidden_states: Tensor, packed_batch: PackedBatch | None) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(hidden_states).chunk(3, dim=-1)
        )
        attended, _ = packed_attention(
            self,
            query,
            key,
            value,
            None,
            packed_batch=packed_batch,  # type: ignore[arg-type]  # None while it is compiled
            scaling=self.scaling,
            position_bias=self.bias.table,
        )
        hidden = self.norm(self.o(attended.flatten(2)) + hidden_states)
        out: Tensor = self.output(self.intermediate(hidden), hidden)
        return out


class BiasedEncoder(nn.Module):
    """An MPNetModel of transformers, run on packed rows."""

    def __init__(self, model: Any) -> None:
        """Take over what `model` is made of; its weights are loaded."""
        super().__init__()
        self.embeddings: nn.Module = model.embeddings
        bias = PositionBias(model.encoder.relative_attention_bias, model.config.max_position_embeddings)
        self.layers = nn.ModuleList(BiasedLayer(layer, bias) for layer in model.encoder.layer)

    def forward(self, input_ids: Tensor, position_ids: Tensor, packed_batch: PackedBatch) -> BaseModelOutput:
        """(1, T) token ids and positions to (1, T, width)."""
        hidden: Tensor = self.embeddings(input_ids=input_ids, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(hidden, packed_batch=packed_batch)
        return BaseModelOutput(last_hidden_state=hidden)


def _merged(projections: list[Any]) -> nn.Linear:
    """Several layers of the same input as one product."""
    first = projections[0].weight
    merged = nn.Linear(first.shape[1], sum(len(each.weight) for each in projections), device="meta")
    for name in ("weight", "bias"):
        rows = torch.cat([getattr(each, name).detach() for each in projections])
        setattr(merged, name, nn.Parameter(rows, requires_grad=False))
    return merged


def with_bias(model: Any) -> Any:
    """An MPNet of transformers, or one with a head, whose encoder is run as above. Its weights must be loaded."""
    encoder = BiasedEncoder(model.base_model)
    if model.base_model is model:
        return encoder
    setattr(model, model.base_model_prefix, encoder)
    return model
