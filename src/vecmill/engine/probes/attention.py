"""The server's attention over ragged rows, against SDPA row by row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.core.types import Row
from vecmill.engine.device import dtype_name, has_bfloat16, has_flash_attention
from vecmill.engine.probes.results import AttentionComparison
from vecmill.models.packed_attention import packed_attention
from vecmill.models.packing import Attention, pack

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 64
LENGTHS = (7, 16, 33, 64, 120, 128, 128, 250, 511)
GPU_COPIES = 8  # of the lengths: enough to keep a GPU busy
WARM_UP, TIMINGS = 3, 9


@torch.inference_mode()
def attention(device: str) -> AttentionComparison:
    """Compare values and speed: bidirectional, in bfloat16 on a GPU that has it and float32 elsewhere."""
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu and has_bfloat16(torch.device(device)) else torch.float32
    flash = on_gpu and dtype is torch.bfloat16 and has_flash_attention(torch.device(device))
    lengths = sorted(LENGTHS * (GPU_COPIES if on_gpu else 1))
    rows = [Row(np.zeros(length, dtype=np.int32)) for length in lengths]
    batch = pack(rows, torch.device(device), attention=Attention.FLASH if flash else Attention.SDPA)
    total = batch.input_ids.shape[1]
    query = _random(HEADS, total, dtype, device)
    key, value = (_random(KV_HEADS, total, dtype, device) for _ in range(2))
    module = nn.Module()

    def ours() -> Tensor:
        out, _ = packed_attention(module, query, key, value, None, packed_batch=batch, is_causal=False)
        return out[0]

    def row_by_row() -> Tensor:
        starts = np.concatenate(([0], np.cumsum(lengths))).tolist()
        rows = [slice(first, end) for first, end in pairwise(starts)]
        parts = [
            F.scaled_dot_product_attention(query[:, :, row], key[:, :, row], value[:, :, row], enable_gqa=True)
            for row in rows
        ]
        return torch.cat([part[0].transpose(0, 1) for part in parts])

    tokens = sum(lengths)
    difference = (ours()[:tokens].float() - row_by_row().float()).abs().max().item()
    return AttentionComparison(
        varlen=flash,
        dtype=dtype_name(dtype),
        rows=len(lengths),
        tokens=tokens,
        largest_difference=difference,
        seconds=_seconds(device, ours),
        sdpa_seconds=_seconds(device, row_by_row),
    )


def _random(heads: int, tokens: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(device, dtype)


def _seconds(device: str, run: Callable[[], object]) -> float:
    taken = []
    for _ in range(WARM_UP + TIMINGS):
        started = perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        taken.append(perf_counter() - started)
    return median(taken[WARM_UP:])
