"""NV-Embed's latent attention, with its constants multiplied out at load.

Each token is a query; the keys and values come from trained latents, so they are the same for every text. With k and v
computed once, a head's scores are LN(h) Wq' k' / sqrt(d) = LN(h) A and its output softmax(...) v Wo' = softmax(...) B:
of the 537 M parameters of full size 34 M are left beside the feed-forward layer, and nothing but rounding changes.

Source: Lee et al. 2024 (https://arxiv.org/abs/2405.17428), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.models.weights import Target, WeightFiles

LATENT_PREFIX = "latent_attention_model."
ATTENTION = LATENT_PREFIX + "cross_attend_blocks.0."
FEED_FORWARD = LATENT_PREFIX + "cross_attend_blocks.1."
KEPT = {
    "norm_weight": ATTENTION + "norm.weight",
    "norm_bias": ATTENTION + "norm.bias",
    "feed_forward_norm_weight": FEED_FORWARD + "norm.weight",
    "feed_forward_norm_bias": FEED_FORWARD + "norm.bias",
    "up_weight": FEED_FORWARD + "fn.net.0.weight",
    "up_bias": FEED_FORWARD + "fn.net.0.bias",
    "down_weight": FEED_FORWARD + "fn.net.2.weight",
    "down_bias": FEED_FORWARD + "fn.net.2.bias",
}
FOLDED = (
    LATENT_PREFIX + "latents",
    *(f"{ATTENTION}norm_context.{part}" for part in ("weight", "bias")),
    *(f"{ATTENTION}fn.{part}.weight" for part in ("to_q", "to_kv", "to_out")),
)
# The reference's defaults; the hub's config.json leaves them out.
HEADS, HEAD_SIZE = 8, 4096


class LatentAttention(nn.Module):
    """(T, width) hidden states -> (T, width): attention over latents, then a gated feed-forward layer."""

    def __init__(self, heads: int, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._heads = heads
        self.norm = _norm(parameters["norm_weight"], parameters["norm_bias"])
        self.scores = _linear(parameters["scores"])
        self.outputs = _linear(parameters["outputs"])
        self.feed_forward_norm = _norm(parameters["feed_forward_norm_weight"], parameters["feed_forward_norm_bias"])
        self.up = _linear(parameters["up_weight"], parameters["up_bias"])
        self.down = _linear(parameters["down_weight"], parameters["down_bias"])

    @classmethod
    def fold(cls, weights: WeightFiles, config: Mapping[str, Any], target: Target) -> Self:
        """Multiply the constants out in float32 on the CPU, head by head, then cast.

        Raises:
            StartupError: a weight is missing, unknown or not finite.
        """
        weights.refuse_unknown(LATENT_PREFIX, {*FOLDED, *KEPT.values()})
        heads = int(config.get("num_cross_heads", HEADS))
        _check_sizes(weights, config, heads)
        latents = _layer_norm(weights, weights.part(LATENT_PREFIX + "latents"), "norm_context")
        scores, outputs = zip(*(_fold_head(weights, latents, head, heads) for head in range(heads)), strict=True)
        cast = partial(Tensor.to, device=target.device, dtype=target.dtype)
        parameters = {
            "scores": cast(torch.cat(scores)),  # (heads * latents, width)
            "outputs": cast(torch.cat(outputs, dim=1)),  # (width, heads * latents)
        }
        return cls(heads, parameters | {name: cast(weights.part(stored)) for name, stored in KEPT.items()})

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, width) -> (T, width), not normed after the block."""
        scores = self.scores(self.norm(hidden))  # (T, heads * latents)
        weights = scores.view(len(hidden), self._heads, -1).softmax(dim=-1).flatten(1)
        hidden = self.outputs(weights) + hidden
        value, gate = self.up(self.feed_forward_norm(hidden)).chunk(2, dim=-1)
        added: Tensor = self.down(value * F.gelu(gate))
        return added + hidden


def _check_sizes(weights: WeightFiles, config: Mapping[str, Any], heads: int) -> None:
    """Raise StartupError unless the sizes in config.json are those of the weights: with other heads, other parts of a
    weight would be multiplied."""
    inner, width = weights.shape(ATTENTION + "fn.to_q.weight")
    latents = weights.shape(LATENT_PREFIX + "latents")[0]
    sizes = {
        "num_latents_value": (config.get("num_latents_value", latents), latents),
        "hidden_dim": (config.get("hidden_dim", width), width),
        "latent_dim": (config.get("latent_dim", width), width),
    }
    if config.keys() & {"num_cross_heads", "cross_dim_head"}:
        sizes["num_cross_heads and cross_dim_head"] = (heads * config.get("cross_dim_head", HEAD_SIZE), inner)
    for name, (stated, stored) in sizes.items():
        if stated != stored:
            raise weights.unfit(
                f"latent_attention_config has {name} for a size of {stated}, the weights one of {stored}"
            )


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer around tensors that are there already."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _norm(weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    layer = nn.LayerNorm(len(weight), device="meta")
    layer.weight, layer.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return layer


def _fold_head(weights: WeightFiles, latents: Tensor, head: int, heads: int) -> tuple[Tensor, Tensor]:
    """One head's part of `scores`, (latents, width), and of `outputs`, (width, latents)."""
    inner = weights.shape(ATTENTION + "fn.to_q.weight")[0]  # heads * size
    size = inner // heads
    own = slice(head * size, (head + 1) * size)
    query = weights.part(ATTENTION + "fn.to_q.weight", own)
    key = weights.part(ATTENTION + "fn.to_kv.weight", own)
    value = weights.part(ATTENTION + "fn.to_kv.weight", slice(inner + own.start, inner + own.stop))
    output = weights.part(ATTENTION + "fn.to_out.weight", columns=own)
    return latents @ key.T @ query / sqrt(size), output @ (latents @ value.T).T


def _layer_norm(weights: WeightFiles, latents: Tensor, name: str) -> Tensor:
    weight, bias = (weights.part(f"{ATTENTION}{name}.{part}") for part in ("weight", "bias"))
    return F.layer_norm(latents, latents.shape[-1:], weight, bias)
