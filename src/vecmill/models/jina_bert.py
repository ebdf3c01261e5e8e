"""JinaBERT, a BERT without a table of positions and with gated layers, for which transformers has no class.

What is made here holds the weights; `biased_layers` runs it. The second of its two layouts (that of
jina-embeddings-v2-base-code) norms queries and keys, and adds what goes into attention to what comes out a second time.

Sources: Günther et al. 2023 (https://arxiv.org/abs/2310.19923); the code that the hub's files were made with
(https://huggingface.co/jinaai/jina-bert-implementation, https://huggingface.co/jinaai/jina-bert-v2-qk-post-norm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "reglu": F.relu}


class JinaBert(BertModel):  # type: ignore[misc]  # transformers has no types
    """transformers' class, with other embeddings and layers."""

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        """`config`: transformers' BertConfig with `feed_forward_type` and `second_layout`."""
        super().__init__(config, add_pooling_layer)
        self.embeddings = JinaEmbeddings(config)
        width, epsilon = config.hidden_size, config.layer_norm_eps
        for layer in self.encoder.layer:
            if config.feed_forward_type in GATES:
                layer.intermediate, layer.output = JinaGatedMLP(config), JinaOutput(config)
            if config.second_layout:
                for name in ("query_norm", "key_norm", "again_norm"):
                    layer.add_module(name, nn.LayerNorm(width, eps=epsilon))


class JinaBertForPairs(BertForSequenceClassification):  # type: ignore[misc]  # as above
    """The same with a head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = JinaBert(config)


class JinaEmbeddings(nn.Module):
    """Of words and token types: where a token stands is not in its embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """(1, T) each to (1, T, width)"""
        embedded: Tensor = self.LayerNorm(self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids))
        return embedded


class JinaGatedMLP(nn.Module):
    """A gated feed-forward layer, whose products `merge_projections` merges."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width)
        self.act_fn = GATES[config.feed_forward_type]


class JinaOutput(nn.Module):
    """The norm after a gated feed-forward layer and what went into it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, added: Tensor) -> Tensor:
        """(1, T, width) each -> (1, T, width)"""
        normed: Tensor = self.LayerNorm(hidden_states + added)
        return normed
