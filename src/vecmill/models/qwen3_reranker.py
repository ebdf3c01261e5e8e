"""Rerankers on a Qwen3 decoder: how much more likely one token is than another after the prompt (Qwen3-Reranker 0.6B,
4B and 8B), or a classification head (`Qwen3ForSequenceClassification`).

Source: Zhang et al. 2025 (https://arxiv.org/abs/2506.05176); https://huggingface.co/Qwen/Qwen3-Reranker-0.6B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from vecmill.core.errors import StartupError
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.qwen3 import decode, load_backbone
from vecmill.models.rerank_prompt import Answers, rerank_form
from vecmill.models.weights import Target, WeightFiles

HEAD, SCORE = "lm_head.weight", "score.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")


class Qwen3Reranker:
    """A packed causal forward pass; of the head the one row, or the difference of two, that makes the score."""

    width = 1

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load the weights. Raises StartupError where any is missing or unknown."""
        self._backbone, config = load_backbone(checkpoint, target)
        self.vocab_size: int = config.vocab_size
        answers = rerank_form(checkpoint).answers
        weights = WeightFiles(checkpoint)
        row = _score(checkpoint, weights, config) if answers is None else _logit(checkpoint, weights, config, answers)
        self._row = row.to(target.device)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self._backbone,)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self._backbone).layers)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, 1) float32 logits, in packed order."""
        last = decode(self._backbone, packed, use_flash_attn)[packed.last].float()
        # Row by row, so that a score does not depend on how many others there are.
        return torch.sum(last * self._row, dim=1, keepdim=True)


def _logit(checkpoint: Checkpoint, weights: WeightFiles, config: Qwen3Config, answers: Answers) -> Tensor:
    """(hidden,) such that h . row = scale * (log p(true) - log p(false)), or the logit of `true` alone."""
    tokens = [answers.true] if answers.false is None else [answers.true, answers.false]
    if max(tokens) >= config.vocab_size:
        raise StartupError(f"{checkpoint.named}: the tokens of its answers {tokens} are not in its vocabulary.")
    # The 8B stores its head; the smaller ones use their token embedding for it. One that is stored counts always.
    head = HEAD
    if HEAD not in weights.files and config.tie_word_embeddings:
        head = next((name for name in EMBEDDINGS if name in weights.files), EMBEDDINGS[0])
    true, *false = (weights.part(head, slice(token, token + 1))[0] for token in tokens)
    return answers.scale * (true - false[0] if false else true)


def _score(checkpoint: Checkpoint, weights: WeightFiles, config: Qwen3Config) -> Tensor:
    """(hidden,) of a classification head."""
    said = config.num_labels
    stored = weights.shape(SCORE)[0] if SCORE in weights.files else said
    if (said, stored) != (1, 1):
        raise StartupError(
            f"{checkpoint.named}: its head has {stored} labels, and config.json has {said} (`id2label`, else 2); a "
            f'reranker has one (a relevance score). Where the head has one, set `id2label` to {{"0": "LABEL_0"}}.'
        )
    return weights.part(SCORE)[0]
