"""BERT's network, as transformers has it: the same modules, names of weights and operations in the same order.

Importing transformers' classes takes longer than everything else at the start of a server with a small model, so the
family that is served where nothing is configured does without them.

Source: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packed_attention import packed_attention
from vecmill.models.packing import PackedBatch

PLAIN_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


def activation(name: str) -> nn.Module:
    """By the name that transformers knows it by."""
    if name in PLAIN_ACTIVATIONS:
        return PLAIN_ACTIVATIONS[name]()
    found: nn.Module = import_module("transformers.activations").ACT2FN[name]
    return found


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The keys of config.json that decide what the network computes, with transformers' defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From the honoured keys of a config.json.

        Raises:
            ValueError: the heads do not share the width.
        """
        config = cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention heads "
                f"({config.num_attention_heads})"
            )
        return config


class BertEmbeddings(nn.Module):
    """Of words, positions and token types."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # Not from random values: to draw them for the device `meta`, torch imports its compiler.
        self.word_embeddings, self.position_embeddings, self.token_type_embeddings = (
            nn.Embedding.from_pretrained(torch.empty(rows, config.hidden_size))  # type: ignore[no-untyped-call]
            for rows in (config.vocab_size, config.max_position_embeddings, config.type_vocab_size)
        )
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """(1, T) each -> (1, T, width)"""
        embedded = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        normed: Tensor = self.LayerNorm(embedded + self.position_embeddings(position_ids))
        return normed


class BertSelfAttention(nn.Module):
    """Attention of packed rows, before its output layer."""

    is_causal = False

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx = layer_idx
        self.attention_head_size = width // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, *, packed_batch: PackedBatch | None) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        query, key, value = (
            part(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended, _ = packed_attention(
            self,
            query,
            key,
            value,
            None,
            packed_batch=packed_batch,  # type: ignore[arg-type]  # None while it is compiled
            scaling=self.scaling,
        )
        return attended.flatten(2)


class BertOutput(nn.Module):
    """A linear layer, what went into the block added to it, and a norm."""

    def __init__(self, config: BertConfig, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, before: Tensor) -> Tensor:
        """(1, T, inputs) and (1, T, width) -> (1, T, width)"""
        normed: Tensor = self.LayerNorm(self.dense(hidden_states) + before)
        return normed


class BertAttention(nn.Module):
    """Attention with its output layer."""

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, layer_idx)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, *, packed_batch: PackedBatch | None) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        out: Tensor = self.output(self.self(hidden_states, packed_batch=packed_batch), hidden_states)
        return out


class BertIntermediate(nn.Module):
    """The feed-forward layer's first half."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, width) -> (1, T, inner width)"""
        out: Tensor = self.intermediate_act_fn(self.dense(hidden_states))
        return out


class BertLayer(nn.Module):
    """Attention and the feed-forward layer."""

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_idx)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, *, packed_batch: PackedBatch | None) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        attended = self.attention(hidden_states, packed_batch=packed_batch)
        out: Tensor = self.output(self.intermediate(attended), attended)
        return out


class BertEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, number) for number in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    """A layer on the hidden state of the first token, for a head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, 1, width) -> (N, width)"""
        return torch.tanh(self.dense(hidden_states[:, 0]))


class BertModel(nn.Module):
    """The encoder."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, packed_batch: PackedBatch, token_type_ids: Tensor
    ) -> SimpleNamespace:
        """(1, T) each; `last_hidden_state` of the result is (1, T, width)."""
        hidden = self.embeddings(input_ids, position_ids, token_type_ids)
        for layer in self.encoder.layer:
            hidden = layer(hidden, packed_batch=packed_batch)
        return SimpleNamespace(last_hidden_state=hidden)


class BertForSequenceClassification(nn.Module):
    """The encoder with a head of one label. `networks` runs the head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    @property
    def base_model(self) -> BertModel:
        """Without the head."""
        return self.bert


CLASSES: Mapping[str, Callable[..., nn.Module]] = {
    each.__name__: each for each in (BertModel, BertForSequenceClassification)
}


def is_of_transformers(name: str) -> bool:
    """Whether transformers has a class of this name, which would read and write such a checkpoint."""
    return name in CLASSES


def make_config(checkpoint: Checkpoint) -> BertConfig:
    """See `transformers_networks.make_config`. Raises ValueError for what cannot be right."""
    return BertConfig.of(checkpoint.arguments)


def make_model(checkpoint: Checkpoint, config: BertConfig) -> nn.Module:
    """See `transformers_networks.make_model`."""
    with torch.device("meta"):
        return CLASSES[checkpoint.network.model_class](config, **checkpoint.network.options)


def complete(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """See `transformers_networks.complete`."""
    return model
