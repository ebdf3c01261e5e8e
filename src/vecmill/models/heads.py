"""sentence-transformers' modules around the pooling, in float32: Dense, LayerNorm and Normalize.

The hidden states may be bfloat16; a head costs little, and its reference has it in float32.

Source: sentence-transformers 6.2, https://sbert.net/docs/package_reference/sentence_transformer/modules.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.modules import Head
from vecmill.models.weights import Target, WeightFiles

ALONG_VECTOR = ("LogSoftmax", "Softmax", "Softmin")  # whose dimension torch would guess


class Dense(nn.Module):
    """(n, in) -> (n, out): a linear layer and an activation, and the input added or not. Its weights are named as in
    the reference."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        config = head.config
        width, out = config["in_features"], config["out_features"]
        options: dict[str, Any] = {"dim": -1} if head.activation in ALONG_VECTOR else {}
        self.linear = nn.Linear(width, out, bias=config.get("bias", True))
        self.activation_function: nn.Module = getattr(nn, head.activation)(**options)
        self._residual = bool(config.get("use_residual", False))
        if self._residual and width != out:
            self.residual = nn.Linear(width, out, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.activation_function(self.linear(vectors))
        if not self._residual:
            return out
        return out + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class LayerNorm(nn.Module):
    """(n, width) -> (n, width)"""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(head.config["dimension"])

    def forward(self, vectors: Tensor) -> Tensor:
        normed: Tensor = self.norm(vectors)
        return normed


class Normalize(nn.Module):
    """(n, width) -> (n, width): unit vectors."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)


def load_heads(checkpoint: Checkpoint, heads: Sequence[Head], target: Target) -> nn.Sequential:
    """The heads in a row, their weights on the target's device.

    Raises:
        StartupError: a weight is missing, unknown, of another shape, or not finite.
    """
    return nn.Sequential(*(_load(checkpoint, head, target) for head in heads)).eval()


def _load(checkpoint: Checkpoint, head: Head, target: Target) -> nn.Module:
    if not head.trained:
        return Normalize()
    with torch.device("meta"):
        module: nn.Module = Dense(head) if head.kind == "Dense" else LayerNorm(head)
    weights = WeightFiles(checkpoint, head)
    wanted = dict(module.named_parameters())
    weights.refuse_unknown("", wanted.keys())
    for name, parameter in wanted.items():
        if tuple(shape := weights.shape(name)) != tuple(parameter.shape):
            raise weights.unfit(
                f"{head.path}/{name} has the shape {tuple(shape)}, its config.json says {tuple(parameter.shape)}"
            )
        part = weights.part(name).to(target.device)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(part, requires_grad=False))
    target.progress(checkpoint.head_file(head).stat().st_size)
    return module
