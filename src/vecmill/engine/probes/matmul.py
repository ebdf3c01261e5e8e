"""How fast the device multiplies matrices, and a load of such products."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from vecmill.engine.device import dtype_name
from vecmill.engine.probes.results import Load, MatmulSpeed

CUDA_SIZE, CPU_SIZE = 4096, 1024
TIMINGS = 9
# A timing of many products: launches and the clock's resolution are nothing against it.
CUDA_TIMING_SECONDS, CPU_TIMING_SECONDS = 0.05, 0.02
# An idle GPU needs a moment to raise its clocks.
WARM_UP_SECONDS = 0.5
LOAD_SECONDS = 5.0


@torch.inference_mode()
def matmul_speed(device: str) -> MatmulSpeed:
    """Time bfloat16 products of 4096 x 4096 on a GPU, of 1024 x 1024 elsewhere."""
    size, multiply = _products(device)
    seconds = _seconds(device, multiply, 1)
    started = perf_counter()
    while perf_counter() - started < WARM_UP_SECONDS:
        seconds = _seconds(device, multiply, 4)
    count = max(1, round((CUDA_TIMING_SECONDS if size == CUDA_SIZE else CPU_TIMING_SECONDS) / seconds))
    rates = [_tflops(size, _seconds(device, multiply, count)) for _ in range(TIMINGS)]
    return MatmulSpeed(device, dtype_name(torch.bfloat16), size, tuple(rates))


@torch.inference_mode()
def load(device: str) -> Load:
    """Keep the device busy for LOAD_SECONDS."""
    size, multiply = _products(device)
    count = max(1, round(CUDA_TIMING_SECONDS / _seconds(device, multiply, 4)))
    done, started = 0, perf_counter()
    while perf_counter() - started < LOAD_SECONDS:
        _seconds(device, multiply, count)
        done += count
    seconds = perf_counter() - started
    return Load(seconds, _tflops(size, seconds / done))


def _products(device: str) -> tuple[int, Callable[[], object]]:
    size = CUDA_SIZE if device.startswith("cuda") else CPU_SIZE
    # Small values: what a GPU draws, and so its clock, follows the data; zeros would make it look faster.
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return size, lambda: torch.matmul(left, right, out=out)


def _seconds(device: str, multiply: Callable[[], object], count: int) -> float:
    """Of one product, over so many. The device is idle before and after."""
    started = perf_counter()
    for _ in range(count):
        multiply()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return (perf_counter() - started) / count


def _tflops(size: int, seconds: float) -> float:
    return 2.0 * size**3 / seconds / 1e12
