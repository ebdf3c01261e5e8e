"""Fewer, larger matrix products: queries, keys and values in one, and the gate with the layer that it gates.

For few tokens a product takes as long as its launch and reading its weights; one large product does both once. The
weights are those of transformers' modules, concatenated by rows; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vecmill.models.cpu_kernels import CpuKernels, in_one_thread
from vecmill.models.packed_attention import packed_attention

QUERY_KEY_VALUE: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
GATE_AND_UP: tuple[str, ...] = ("gate_proj", "up_proj")


def rotated(heads: Tensor, cos: Tensor, sin: Tensor, kernels: CpuKernels | None = None) -> Tensor:
    """(1, heads, T, head_dim) rotated by (1, T, head_dim) each, as transformers' `apply_rotary_pos_emb` does it.

    Args:
        kernels: where they are used, the values of `heads` are overwritten.
    """
    kernels = in_one_thread(kernels)
    if kernels is not None and heads.dtype is cos.dtype:
        kernels.rotate(heads, cos, sin)
        return heads
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    if heads.device.type == "cpu" and not torch.compiler.is_compiling():
        # Three passes over the values in place of five, and one rounding less. The product that is rounded by itself is
        # the one with the sine: most pairs of values turn by little, so it is the smaller one.
        half = first.shape[-1]
        out = torch.empty_like(heads)
        torch.mul(second, -sin[..., :half], out=out[..., :half])
        torch.mul(first, sin[..., half:], out=out[..., half:])
        return out.addcmul_(heads, cos)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _query_scale(positions: Tensor, beta: float, trained: int) -> Tensor:
    """(1, T) to (1, 1, T, 1): Ministral 3's queries grow where positions go beyond those that it was trained on."""
    return (1 + beta * torch.log(1 + torch.floor(positions / trained)))[:, None, :, None]


class MergedAttention(nn.Module):
    """Rotary attention of packed rows, whose queries, keys and values come from one product."""

    def __init__(self, attention: Any, qkv_proj: nn.Module, sizes: list[int], o_proj: nn.Module) -> None:
        """Take over what else `attention`, a module of transformers, is made of.

        Args:
            sizes: how many of the values that `qkv_proj` gives are queries, keys and values.
        """
        super().__init__()
        self.layer_idx: int | None = getattr(attention, "layer_idx", None)
        self.is_causal: bool = attention.is_causal
        self.head_dim: int = attention.head_dim
        self.scaling: float = getattr(attention, "scaling", self.head_dim**-0.5)
        # Where layers are all alike, as Mistral's, they ask their configuration.
        self.sliding_window: int | None = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )
        self.qkv_proj, self.sizes, self.o_proj = qkv_proj, sizes, o_proj
        # Qwen3 norms each head of its queries and keys.
        self.q_norm: nn.Module = getattr(attention, "q_norm", nn.Identity())
        self.k_norm: nn.Module = getattr(attention, "k_norm", nn.Identity())
        rope = getattr(attention.config, "rope_parameters", None) or {}
        self.query_scale: tuple[float, int] | None = None
        self.rotates_with: CpuKernels | None = None
        """What rotates queries and keys on a CPU; None: torch's operations."""
        if "llama_4_scaling_beta" in rope:  # Ministral 3's queries grow with their distance from the beginning
            self.query_scale = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(1, T, width) -> (1, T, width), and no weights; called as the module that it stands for."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(hidden_states).split(self.sizes, dim=-1)
        )
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = (rotated(each, *position_embeddings, self.rotates_with) for each in (query, key))
        if self.query_scale is not None:
            query = query * _query_scale(kwargs["position_ids"], *self.query_scale).to(query.dtype)
        attended, _ = packed_attention(
            self,
            query,
            key,
            value.transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), None


class MergedMLP(nn.Module):
    """A gated feed-forward layer whose two products of the hidden states are one."""

    def __init__(self, mlp: Any) -> None:
        """Take over what `mlp`, a module of transformers, is made of."""
        super().__init__()
        self.gate_up_proj, self.sizes = _merged(mlp, GATE_AND_UP)
        self.down_proj: nn.Module = mlp.down_proj
        self.act_fn: nn.Module = mlp.act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        gate, up = self.gate_up_proj(hidden_states).split(self.sizes, dim=-1)
        down: Tensor = self.down_proj(self.act_fn(gate) * up)
        return down


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a merged parameter hold a parameter of transformers' class."""

    parameter: str
    start: int
    stop: int


def merge_projections(model: nn.Module, classes: Collection[str]) -> dict[str, Rows]:
    """Replace the modules of these classes; returns where the rows of each parameter that is gone belong.

    To be called before the weights are there: what the merged parameters hold has not been written yet.

    Args:
        classes: names of transformers' classes, each a rotary attention with QUERY_KEY_VALUE or a gated feed-forward
            layer with GATE_AND_UP.
    """
    places: dict[str, Rows] = {}
    for name, module in list(model.named_modules()):
        merged: nn.Module
        parts: tuple[str, ...]
        if type(module).__name__ not in classes:
            continue
        if hasattr(module, QUERY_KEY_VALUE[0]):
            merged = MergedAttention(module, *_merged(module, QUERY_KEY_VALUE), module.o_proj)
            parts, whole = QUERY_KEY_VALUE, f"{name}.qkv_proj"
        else:
            merged, parts, whole = MergedMLP(module), GATE_AND_UP, f"{name}.gate_up_proj"
        start = 0
        for part in parts:
            stop = start + getattr(module, part).out_features
            for leaf, _ in getattr(module, part).named_parameters():
                places[f"{name}.{part}.{leaf}"] = Rows(f"{whole}.{leaf}", start, stop)
            start = stop
        model.set_submodule(name, merged)
    return places


def _merged(module: Any, names: tuple[str, ...]) -> tuple[nn.Linear, list[int]]:
    """One layer in place of those of these names, its weights not written yet, and the number of outputs of each."""
    parts: list[nn.Linear] = [getattr(module, name) for name in names]
    sizes = [part.out_features for part in parts]
    first = parts[0]
    merged = nn.Linear(first.in_features, sum(sizes), bias=first.bias is not None, device="meta")
    for name, old in list(merged.named_parameters()):
        new = torch.empty(old.shape, dtype=first.weight.dtype, device=first.weight.device)
        setattr(merged, name, nn.Parameter(new, requires_grad=False))
    return merged, sizes
