"""Qwen3-Reranker 0.6B, 4B and 8B: how much more likely "yes" is than "no" after the prompt.

Source: Zhang et al. 2025 (https://arxiv.org/abs/2506.05176); https://huggingface.co/Qwen/Qwen3-Reranker-0.6B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vecmill.core.errors import StartupError
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.qwen3 import decode, load_backbone
from vecmill.models.rerank_prompt import answer_tokens
from vecmill.models.weights import Target, WeightFiles

# The 8B stores its head; the smaller ones use their token embedding for it.
HEADS = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight")


class Qwen3Reranker:
    """A packed causal forward pass; of the head's 151,669 rows the two that are compared."""

    width = 1

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load the weights. Raises StartupError where any is missing or unknown."""
        self._backbone, config = load_backbone(checkpoint, target)
        self.vocab_size: int = config.vocab_size
        weights = WeightFiles(checkpoint)
        head = next((name for name in HEADS if name in weights.files), HEADS[0])
        answers = answer_tokens(checkpoint)
        if max(answers) >= config.vocab_size:
            raise StartupError(f"{checkpoint.named}: the tokens of yes and no {answers} are not in its vocabulary.")
        yes, no = (weights.part(head, slice(token, token + 1))[0] for token in answers)
        # log p(yes) - log p(no) = h . yes - h . no = h . (yes - no)
        self._yes_minus_no = (yes - no).to(target.device)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self._backbone,)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self._backbone).layers)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, 1) float32 logits of "yes" against "no", in packed order."""
        last = decode(self._backbone, packed, use_flash_attn)[packed.last].float()
        # Row by row, so that a score does not depend on how many others there are.
        return torch.sum(last * self._yes_minus_no, dim=1, keepdim=True)
