"""Which type the weights get, and why. Never float16 unless asked: models trained in bfloat16 overflow in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from vecmill.models.packing import pack
from vecmill.models.registry import Embedder

PROBE_ROWS, PROBE_LENGTH, PROBE_RUNS = 8, 128, 3


@dataclass(frozen=True, slots=True)
class ChosenDtype:
    """A dtype and the reason, for the start log and /health."""

    dtype: torch.dtype
    reason: str


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(wanted: str, device: torch.device) -> ChosenDtype | None:
    """The dtype by setting or by device; None on a CPU, where only measuring tells."""
    if wanted != "auto":
        return ChosenDtype(getattr(torch, wanted), f"DTYPE={wanted}")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ChosenDtype(torch.bfloat16, "range of float32 at the speed of 16 bits on this GPU")
        return ChosenDtype(torch.float32, "this GPU has no bfloat16, and float16 overflows")
    if device.type == "mps":
        return ChosenDtype(torch.float32, "the safe choice on MPS")
    return None


def load_fastest(load: Callable[[torch.dtype], Embedder]) -> tuple[Embedder, ChosenDtype]:
    """Load in float32 and in bfloat16, time both on this CPU, keep the faster."""
    rates: dict[torch.dtype, float] = {}
    embedders: dict[torch.dtype, Embedder] = {}
    for dtype in (torch.float32, torch.bfloat16):
        embedders[dtype] = load(dtype)
        rates[dtype] = _tokens_per_second(embedders[dtype])
    fastest, slowest = sorted(rates, key=lambda dtype: -rates[dtype])
    reason = (
        f"measured on this CPU: {rates[fastest]:,.0f} tokens/s, against {rates[slowest]:,.0f} in {dtype_name(slowest)}"
    )
    return embedders[fastest], ChosenDtype(fastest, reason)


@torch.inference_mode()
def _tokens_per_second(embedder: Embedder) -> float:
    ids = np.arange(PROBE_LENGTH, dtype=np.int32) % embedder.vocab_size
    packed = pack([ids] * PROBE_ROWS, torch.device("cpu"))
    seconds = []
    for _ in range(PROBE_RUNS):
        started = perf_counter()
        embedder.forward(packed, use_flash_attn=False)
        seconds.append(perf_counter() - started)
    return PROBE_ROWS * PROBE_LENGTH / min(seconds)
