"""The one attention function that every family runs through: sequences packed in one row never see each other.

Registered with transformers under the name `packed`. transformers builds no mask for a name it has no mask
function for, and hands extra forward arguments down to the attention function: `packed_batch` travels that way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from vecmill.models.packing import EqualLengths, PackedBatch

ATTENTION = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, head_dim)
    key: Tensor,  # (1, kv_heads, T, head_dim)
    value: Tensor,  # (1, kv_heads, T, head_dim)
    attention_mask: Tensor | None,
    *,
    packed_batch: PackedBatch,
    scaling: float | None = None,
    is_causal: bool | None = None,
    use_flash_attn: bool = True,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed row. Returns (1, T, heads, head_dim), and no weights.

    Flash kernels take 16-bit types on CUDA only; everywhere else SDPA runs once per distinct length.
    """
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    grouped_query = query.shape[1] != key.shape[1]
    if use_flash_attn and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, head_dim)
        out = varlen_attn(
            q,
            k,
            v,
            packed_batch.cu_seqlens,
            packed_batch.cu_seqlens,
            packed_batch.max_length,
            packed_batch.max_length,
            scale=scaling,
            enable_gqa=grouped_query,
            window_size=(-1, 0) if causal else (-1, -1),
        )
        assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
        return out[None], None
    parts = [
        F.scaled_dot_product_attention(
            _rows(query, group),
            _rows(key, group),
            _rows(value, group),
            scale=scaling,
            is_causal=causal,
            enable_gqa=grouped_query,
        )
        for group in packed_batch.groups
    ]
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[None], None


def _rows(tensor: Tensor, group: EqualLengths) -> Tensor:
    """(1, heads, T, head_dim) -> (rows, heads, length, head_dim), without a copy."""
    tokens = tensor[0, :, group.start : group.start + group.rows * group.length]
    return tokens.view(tensor.shape[1], group.rows, group.length, tensor.shape[3]).transpose(0, 1)


AttentionInterface.register(ATTENTION, packed_attention)
