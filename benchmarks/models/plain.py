"""The plain ways that vecmill's are measured against, written from the maths and from transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vecmill.core.types import TokenIds
from vecmill.models.merged_projections import GATE_AND_UP, QUERY_KEY_VALUE, MergedAttention, MergedMLP

BATCH = 32


class PlainLatentAttention:
    """NV-Embed's latent attention as its paper has it: queries from tokens, keys and values from the latents.

    Keys and values are computed in each call, as the model's own code does; `kept` computes them once.
    """

    def __init__(self, file: Path, heads: int, device: torch.device, dtype: torch.dtype, *, kept: bool = False) -> None:
        named = {name: tensor.to(device, dtype) for name, tensor in load_file(file).items()}
        prefix = "latent_attention_model."
        blocks = [f"{prefix}cross_attend_blocks.{number}." for number in (0, 1)]
        self._latents = named[prefix + "latents"]
        self._attend = {key.removeprefix(blocks[0]): value for key, value in named.items() if key.startswith(blocks[0])}
        self._gated = {key.removeprefix(blocks[1]): value for key, value in named.items() if key.startswith(blocks[1])}
        self._heads = heads
        self._kept = self._keys_and_values() if kept else None
        if kept:
            del self._attend["fn.to_kv.weight"]

    def __call__(self, hidden: Tensor) -> Tensor:
        """(T, width) -> (T, width)"""
        weights = self._attend
        keys, values = self._kept or self._keys_and_values()  # (heads, latents, size)
        normed = F.layer_norm(hidden, hidden.shape[-1:], weights["norm.weight"], weights["norm.bias"])
        queries = self._split(F.linear(normed, weights["fn.to_q.weight"]))
        shares = (queries @ keys.mT / keys.shape[-1] ** 0.5).softmax(dim=-1)
        attended = (shares @ values).transpose(0, 1).flatten(1)
        hidden = hidden + F.linear(attended, weights["fn.to_out.weight"])
        weights = self._gated
        normed = F.layer_norm(hidden, hidden.shape[-1:], weights["norm.weight"], weights["norm.bias"])
        both = F.linear(normed, weights["fn.net.0.weight"], weights["fn.net.0.bias"])
        half = both.shape[-1] // 2
        gated = both[:, :half] * F.gelu(both[:, half:])
        return hidden + F.linear(gated, weights["fn.net.2.weight"], weights["fn.net.2.bias"])

    def _keys_and_values(self) -> tuple[Tensor, Tensor]:
        weights = self._attend
        context = F.layer_norm(
            self._latents, self._latents.shape[-1:], weights["norm_context.weight"], weights["norm_context.bias"]
        )
        both = F.linear(context, weights["fn.to_kv.weight"])
        half = both.shape[-1] // 2
        return self._split(both[:, :half]), self._split(both[:, half:])

    def _split(self, rows: Tensor) -> Tensor:
        """(N, heads * size) -> (heads, N, size)"""
        return rows.reshape(len(rows), self._heads, -1).transpose(0, 1)

    def operations(self, tokens: int) -> int:
        """Of one call."""
        weights, latents = self._attend, len(self._latents)
        inner = weights["fn.to_q.weight"].shape[0]
        per_token = sum(weights[f"fn.{name}.weight"].numel() for name in ("to_q", "to_out"))
        per_token += sum(self._gated[f"fn.net.{number}.weight"].numel() for number in (0, 2))
        keys_and_values = 0 if self._kept else 2 * latents * weights["fn.to_kv.weight"].numel()
        return keys_and_values + tokens * (2 * per_token + 4 * latents * inner)

    def weight_bytes(self) -> int:
        """That one call reads."""
        kept = [self._kept[0], self._kept[1]] if self._kept else []
        read = [*self._attend.values(), *self._gated.values(), *kept]
        return sum(tensor.numel() * tensor.element_size() for tensor in read if tensor.dim() > 1)


def with_sdpa(packed_backbone: nn.Module) -> nn.Module:
    """transformers' own model with its own attention, on the very same weights."""
    old: Any = packed_backbone
    config = type(old.config)(**old.config.to_dict())
    options = {"add_pooling_layer": False} if config.model_type == "bert" else {}
    with torch.device("meta"):
        new = type(old)(config, **options)
    new.set_attn_implementation("sdpa")
    new.load_state_dict(unmerged(old), assign=True)
    buffers = dict(old.named_buffers())
    for name, _ in list(new.named_buffers()):
        module_name, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(module_name), leaf, buffers[name])
    module: nn.Module = new.eval()
    return module


def unmerged(model: nn.Module) -> dict[str, Tensor]:
    """The weights under transformers' names; those of merged products as views of their rows."""
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, MergedAttention):
            merged, parts, sizes = "qkv_proj", QUERY_KEY_VALUE, module.sizes
        elif isinstance(module, MergedMLP):
            merged, parts, sizes = "gate_up_proj", GATE_AND_UP, module.sizes
        else:
            continue
        rows = weights.pop(f"{name}.{merged}.weight").split(sizes)
        weights |= {f"{name}.{part}.weight": own for part, own in zip(parts, rows, strict=True)}
    return weights


def padded(backbone: nn.Module, rows: Sequence[TokenIds], device: torch.device, pooling: str) -> Tensor:
    """(N, width) float32 on the CPU: transformers' forward over batches of 32 in the rows' order, padded right."""
    parts = [_padded(backbone, rows[start : start + BATCH], device, pooling) for start in range(0, len(rows), BATCH)]
    return torch.cat([part.cpu() for part in parts])


def _padded(backbone: nn.Module, rows: Sequence[TokenIds], device: torch.device, pooling: str) -> Tensor:
    ids, mask = (tensor.to(device) for tensor in pad_right(rows))
    return pooled(backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask, pooling)


def pad_right(rows: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask on the CPU, both (N, longest) int64."""
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(N, longest, width) padded on the right -> (N, width) float32."""
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1].float()
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def by_length(rows: Sequence[TokenIds], run: Callable[[Sequence[TokenIds]], Tensor]) -> Tensor:
    """Call `run` with the rows sorted by length, and return its answers in the rows' original order."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vectors = run([rows[index] for index in order])
    restored = torch.empty_like(vectors)
    restored[torch.tensor(order)] = vectors
    return restored
