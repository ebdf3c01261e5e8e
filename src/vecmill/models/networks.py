"""BERT and XLM-R cross-encoders with one label (ms-marco-MiniLM, bge-reranker-base, bge-reranker-v2-m3): one logit
per pair of query and document.

Source: Nogueira and Cho 2019 (https://arxiv.org/abs/1901.04085); https://huggingface.co/BAAI/bge-reranker-v2-m3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from vecmill.models.bert import encode, layer_norm_name, padding_with_a_place
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.weights import Target, load_weights, make_config

CLASSES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForSequenceClassification),
}
UNUSED = ("bert.embeddings.position_ids", "roberta.embeddings.position_ids", "roberta.pooler.")


class CrossEncoder:
    """A packed forward pass through an encoder and its classification head."""

    width = 1

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load the weights. Raises StartupError where any is missing or unknown."""
        config_class, model_class = CLASSES[checkpoint.model_type]
        config: Any = make_config(config_class, checkpoint, checkpoint.architecture)
        self.vocab_size: int = config.vocab_size
        self._padding = padding_with_a_place(config)
        model: Any = load_weights(model_class, checkpoint, config, target, rename)
        self._encoder: nn.Module = model.base_model
        head: nn.Module = model.classifier
        if checkpoint.model_type == "bert":  # BERT's tanh layer is its pooler, XLM-R's is in its head
            head = nn.Sequential(model.bert.pooler, head)
            model.bert.pooler = None
        self._head = head.float()  # scores are float32 whatever the weights' type

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self._encoder, self._head)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self._encoder).encoder.layer)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, 1) float32 logits, in packed order."""
        hidden = encode(self._encoder, packed, self._padding, use_flash_attn)
        # The head takes the first token of (N, 1, width) by itself.
        logits: Tensor = self._head(hidden[packed.first].float()[:, None])
        return logits.view(-1, 1)


def rename(name: str) -> Sequence[str]:
    """The names of the class, but for what pre-training left."""
    if name.startswith(UNUSED):
        return ()
    return (layer_norm_name(name),)
