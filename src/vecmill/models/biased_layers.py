"""Layers whose attention depends on the distance of two tokens, on packed rows: MPNet's, DeBERTa's and JinaBERT's.

transformers' own classes compute the bias for all pairs of tokens that they are given, which would be a whole pack, and
do not run through its attention interface. So their weights run here.

MPNet adds a number for each distance, the same in all layers; distances are put into buckets as T5 does it. DeBERTa
adds two products for each pair: of the query with a key of their distance, and of the key with a query of their
distance. What these are made of does not depend on a text and is computed at load. JinaBERT has ALiBi, which falls with
the distance, both ways.

Sources: Song et al. 2020 (https://arxiv.org/abs/2004.09297); Raffel et al. 2019 (https://arxiv.org/abs/1910.10683);
He et al. 2020 (https://arxiv.org/abs/2006.03654); Press et al. 2021 (https://arxiv.org/abs/2108.12409).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from vecmill.models.family import PositionBias
from vecmill.models.fused_norms import norm_of_sum
from vecmill.models.packed_attention import bias_table, packed_attention
from vecmill.models.packing import PackedBatch


class Distances(nn.Module):
    """A table as `bias_table` makes it, which all layers share."""

    table: Tensor

    def __init__(self, of_distances: Callable[[Tensor], Tensor], positions: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("table", bias_table(of_distances, positions, device), persistent=False)


class BiasedLayer(nn.Module):
    """Attention with a bias, then the feed-forward layer, each followed by its norm."""

    def __init__(self, layer: Any, projections: list[Any], dense: Any, norm: Any, heads: int, table: Distances) -> None:
        """Take over what `layer`, of transformers, is made of."""
        super().__init__()
        self.heads = heads
        self.qkv = _merged(projections)
        # JinaBERT's second layout norms queries and keys, and adds what went into attention again.
        self.query_norm: nn.Module = getattr(layer, "query_norm", nn.Identity())
        self.key_norm: nn.Module = getattr(layer, "key_norm", nn.Identity())
        self.again_norm: nn.Module | None = getattr(layer, "again_norm", None)
        self.scaling = (self.qkv.out_features / 3 / heads) ** -0.5
        self.dense: nn.Module = dense
        self.norm: nn.Module = norm
        self.intermediate: nn.Module = layer.intermediate
        self.output: nn.Module = layer.output
        self.distances = table

    def forward(self, hidden_states: Tensor, packed_batch: PackedBatch | None) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query_norm(query), self.key_norm(key), value)
        )
        attended, _ = packed_attention(
            self,
            query,
            key,
            value,
            None,
            packed_batch=packed_batch,  # type: ignore[arg-type]  # None while it is compiled
            scaling=self.scaling,
            position_bias=self.distances.table,
            position_projections=self.position_projections,
        )
        hidden = norm_of_sum(self.norm, self.dense(attended.flatten(2)), hidden_states)
        if self.again_norm is not None:
            hidden = norm_of_sum(self.again_norm, hidden, hidden_states)
        out: Tensor = self.output(self.intermediate(hidden), hidden)
        return out

    @property
    def position_projections(self) -> tuple[Tensor, Tensor] | None:
        """What queries and keys are multiplied with for their distance, see `packed_attention`; None: nothing."""
        return None


class DisentangledLayer(BiasedLayer):
    """With keys and queries of distances, which are those of the layer's own projections."""

    position_keys: Tensor
    """(buckets, heads, head_dim), scaled as scores are."""
    position_queries: Tensor
    """The same."""

    def __init__(self, layer: Any, of_distances: Tensor, table: Distances) -> None:
        """`of_distances`: (buckets, width), the embedding that all layers share."""
        attention, output = layer.attention.self, layer.attention.output
        projections = [attention.query_proj, attention.key_proj, attention.value_proj]
        super().__init__(layer, projections, output.dense, output.LayerNorm, attention.num_attention_heads, table)
        self.scaling = (3 * attention.attention_head_size) ** -0.5
        for name, projection in (("position_queries", projections[0]), ("position_keys", projections[1])):
            projected = projection(of_distances).unflatten(-1, (self.heads, -1))
            self.register_buffer(name, (self.scaling * projected).contiguous(), persistent=False)

    @property
    def position_projections(self) -> tuple[Tensor, Tensor] | None:
        """Keys and queries of the buckets of distances."""
        return self.position_keys, self.position_queries


class BiasedEncoder(nn.Module):
    """An encoder of transformers, run on packed rows."""

    def __init__(self, embeddings: nn.Module, layers: Iterable[nn.Module], pooler: nn.Module | None = None) -> None:
        """`pooler`: of a model with a head, for which it is kept."""
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.pooler = pooler

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, packed_batch: PackedBatch, **embedded: Tensor
    ) -> BaseModelOutput:
        """(1, T) token ids, positions and what else the embeddings take, to (1, T, width)."""
        hidden: Tensor = self.embeddings(input_ids=input_ids, position_ids=position_ids, **embedded)
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


def _mpnet(model: Any) -> BiasedEncoder:
    weight: Tensor = model.encoder.relative_attention_bias.weight.detach()

    def of_distances(distances: Tensor) -> Tensor:
        return weight[MPNetEncoder.relative_position_bucket(distances)].T

    table = Distances(of_distances, model.config.max_position_embeddings, weight.device)
    layers = []
    for layer in model.encoder.layer:
        attention = layer.attention.attn
        projections = [attention.q, attention.k, attention.v]
        heads = attention.num_attention_heads
        layers.append(BiasedLayer(layer, projections, attention.o, layer.attention.LayerNorm, heads, table))
    return BiasedEncoder(model.embeddings, layers)


def _deberta(model: Any) -> BiasedEncoder:
    first = model.encoder.layer[0].attention.self
    span: int = first.pos_ebd_size

    def of_distances(distances: Tensor) -> Tensor:
        before = -distances  # query less key
        if first.position_buckets > 0:
            before = make_log_bucket_position(before, first.position_buckets, first.max_relative_positions).long()
        return (before + span).clamp(0, 2 * span - 1)[None]

    embedding = model.encoder.get_rel_embedding()
    table = Distances(of_distances, model.config.max_position_embeddings, embedding.device)
    return BiasedEncoder(
        model.embeddings, (DisentangledLayer(layer, embedding, table) for layer in model.encoder.layer)
    )


def _jina(model: Any) -> BiasedEncoder:
    heads, like = model.config.num_attention_heads, model.encoder.layer[0].attention.self.query.weight
    slopes = torch.tensor(alibi_slopes(heads), device=like.device)[:, None]

    def of_distances(distances: Tensor) -> Tensor:
        return (-slopes * distances.abs()).to(like.dtype)

    table = Distances(of_distances, model.config.max_position_embeddings, like.device)
    layers = []
    for layer in model.encoder.layer:
        own, output = layer.attention.self, layer.attention.output
        projections = [own.query, own.key, own.value]
        layers.append(BiasedLayer(layer, projections, output.dense, output.LayerNorm, heads, table))
    return BiasedEncoder(model.embeddings, layers, model.pooler)


def alibi_slopes(heads: int) -> list[float]:
    """By how much attention of each head falls with each token: a geometric series from 2 ** (-8 / heads) on.

    Of a number of heads that is no power of two the first ones have the series of the power below it, and the others
    every second slope of the series of twice as many, as the authors' code has it.
    """
    power = 1 << (heads.bit_length() - 1)
    series = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return series + [2 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]


ENCODERS: Mapping[PositionBias, Callable[[Any], BiasedEncoder]] = {
    "buckets": _mpnet,
    "disentangled": _deberta,
    "alibi": _jina,
}


def with_bias(model: Any, kind: PositionBias) -> Any:
    """A model of transformers, or one with a head, whose encoder is run as above. Its weights must be loaded."""
    encoder = ENCODERS[kind](model.base_model)
    if model.base_model is model:
        return encoder
    setattr(model, model.base_model_prefix, encoder)
    return model
