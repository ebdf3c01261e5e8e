"""nomic BERT with what transformers' class lacks: biases, feed-forward layers without a gate, and mixtures of experts.

A mixture is several feed-forward layers, of which each token goes through the few that a router finds best. What a text
shares a batch with changes nothing but the last bits, and which expert a token gets where two are as good as equal.

On CUDA every token goes through all experts, as one wide feed-forward layer in which those that were not chosen count
for nothing: how many tokens each expert gets is known on the device alone, and a pass that waits for it can neither be
launched ahead nor be captured as a graph. Elsewhere tokens are sorted by expert, and each goes through its own only.

Sources: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538); Nussbaum and Duderstadt 2025
(https://arxiv.org/abs/2502.07972); the code that the hub's files were made with
(https://huggingface.co/nomic-ai/nomic-bert-2048).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NomicBertModel

# Tokens that go through all experts at once: what is between their two products takes 50 MB in bfloat16 for 8 experts
# of 3,072 values.
ALL_EXPERTS_TOKENS = 1024


class NomicBert(NomicBertModel):  # type: ignore[misc]  # transformers has no types
    """transformers' class, with layers as the hub's keys of config.json say."""

    def __init__(self, config: Any, **options: Any) -> None:
        """`config`: transformers', with the keys that families/nomic_bert.py adds."""
        super().__init__(config, **options)
        for number, layer in enumerate(self.layers):
            if config.qkv_proj_bias:
                _add_biases(layer.self_attn, "q_proj", "k_proj", "v_proj", "o_proj")
            if number in config.mixture_layers:
                layer.mlp = Mixture(config)
            elif not config.gated:
                layer.mlp = PlainFeedForward(config)
            else:
                _add_biases(layer.mlp, *(("gate_proj", "up_proj") if config.mlp_fc1_bias else ()))
                _add_biases(layer.mlp, *(("down_proj",) if config.mlp_fc2_bias else ()))


def _add_biases(module: Any, *names: str) -> None:
    for name in names:
        without = getattr(module, name)
        setattr(module, name, nn.Linear(without.in_features, without.out_features))


class PlainFeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_fc1_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_fc2_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        out: Tensor = self.down_proj(F.gelu(self.up_proj(hidden_states)))
        return out


class Mixture(nn.Module):
    """For each token the weighted sum of what the experts that the router finds best give for it, and a bias."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.experts: int = config.num_experts
        self.chosen: int = config.moe_top_k
        self.normalizes = bool(config.moe_normalize_expert_weights)
        self.router = nn.Linear(config.hidden_size, self.experts, bias=False)
        # Of all experts, one below the other, as the hub's files have them.
        self.up = nn.Parameter(torch.empty(self.experts * config.intermediate_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(self.experts * config.intermediate_size, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        tokens = hidden_states.flatten(0, -2)
        # In float32: of two experts that are nearly equal a rounded score would choose either.
        scores = F.linear(tokens.float(), self.router.weight.float()).softmax(dim=-1)
        weights, chosen = scores.topk(self.chosen, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        run = _operation if torch.compiler.is_compiling() else _run
        return (run(tokens, self.up, self.down, weights, chosen, self.experts) + self.bias).view_as(hidden_states)


def _run(tokens: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
    way = through_all_experts if tokens.is_cuda else through_own_experts
    return way(tokens, up, down, weights, chosen, experts)


# For torch.compile one opaque operation: how it is cut depends on the number of tokens.
@torch.library.custom_op("vecmill::mixture", mutates_args=())
def _operation(tokens: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
    return _run(tokens, up, down, weights, chosen, experts)


@_operation.register_fake
def _(tokens: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
    return torch.empty_like(tokens)


def through_own_experts(
    tokens: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, experts: int
) -> Tensor:
    """Each token through the experts that were chosen for it, which the host has to know the numbers of.

    Args:
        tokens: (T, width)
        up: (experts * inner, width), what goes before the GELU.
        down: The same, what goes after it.
        weights: (T, K) float32 of the chosen experts.
        chosen: (T, K) int64, their numbers.
        experts: how many there are.

    Returns:
        (T, width) weighted sums.
    """
    choices = chosen.flatten()
    order = choices.argsort(stable=True)
    counts = choices.bincount(minlength=experts).tolist()
    parts = torch.split(tokens[order // chosen.shape[1]], counts)
    given = [
        F.gelu(F.linear(part, first)) @ second
        for part, first, second in zip(parts, up.chunk(experts), down.chunk(experts), strict=True)
    ]
    of_choices = tokens.new_empty(len(choices), tokens.shape[1])
    of_choices[order] = torch.cat(given)
    weighted = of_choices.view(*chosen.shape, -1) * weights[..., None]
    return weighted.sum(dim=1).to(tokens.dtype)


def through_all_experts(
    tokens: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, experts: int
) -> Tensor:
    """The same, computed without the host: the weights of the experts that were not chosen are 0."""
    shares = weights.new_zeros(len(tokens), experts).scatter(1, chosen, weights).to(tokens.dtype)
    parts = []
    several = (torch.split(each, ALL_EXPERTS_TOKENS) for each in (tokens, shares))
    for part, share in zip(*several, strict=True):
        inner = F.gelu(F.linear(part, up)).view(len(part), experts, -1)
        parts.append((inner * share[..., None]).flatten(-2) @ down)
    return torch.cat(parts) if len(parts) > 1 else parts[0]
