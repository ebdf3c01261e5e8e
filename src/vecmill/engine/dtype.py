"""Which type the weights get, and why. Never float16 unless asked: models trained in bfloat16 overflow in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import torch
import torch.nn.functional as F

from vecmill.engine.device import has_bfloat16

PROBE_ROWS, PROBE_RUNS = 512, 5
PROBE_EXPANSION = 4  # of a transformer's feed-forward layer, where most of the time goes


@dataclass(frozen=True, slots=True)
class ChosenDtype:
    """A dtype and the reason, for the start log and /health."""

    dtype: torch.dtype
    reason: str


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(wanted: str, device: torch.device, width: int) -> ChosenDtype:
    """The dtype by setting, by device or, on a CPU, by what is faster at a model's width."""
    if wanted != "auto":
        return ChosenDtype(getattr(torch, wanted), f"DTYPE={wanted}")
    if device.type == "cuda":
        if has_bfloat16(device):
            return ChosenDtype(torch.bfloat16, "range of float32 at the speed of 16 bits on this GPU")
        return ChosenDtype(torch.float32, "this GPU has no bfloat16, and float16 overflows")
    if device.type == "mps":
        return ChosenDtype(torch.float32, "the safe choice on MPS")
    return _fastest_on_cpu(width)


@lru_cache  # measured once for a width: models that share their weights must get the same type
@torch.inference_mode()
def _fastest_on_cpu(width: int) -> ChosenDtype:
    """Compare the types on a feed-forward layer; in turns, so that other work on the machine slows both."""
    layers = {dtype: _layer(width, dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
    for _ in range(PROBE_RUNS):
        for dtype, (hidden, up, down) in layers.items():
            started = perf_counter()
            F.linear(F.gelu(F.linear(hidden, up)), down)
            seconds[dtype].append(perf_counter() - started)
    operations = 2 * 2 * PROBE_ROWS * width * width * PROBE_EXPANSION
    rates = {dtype: operations / min(taken) / 1e9 for dtype, taken in seconds.items()}
    fastest, slowest = sorted(rates, key=lambda dtype: -rates[dtype])
    reason = (
        f"measured on this CPU: {rates[fastest]:,.0f} GFLOP/s, against {rates[slowest]:,.0f} in {dtype_name(slowest)}"
    )
    return ChosenDtype(fastest, reason)


def _layer(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (PROBE_ROWS, width), (PROBE_EXPANSION * width, width), (width, PROBE_EXPANSION * width)
    hidden, up, down = (torch.full(shape, 0.01, dtype=dtype) for shape in shapes)
    return hidden, up, down
