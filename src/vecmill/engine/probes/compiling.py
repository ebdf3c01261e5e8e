"""Whether torch.compile works here: it needs a compiler, and on a GPU Triton."""

from __future__ import annotations

from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from vecmill.engine.probes.results import CompileTry

SIZE = 64


@torch.inference_mode()
def compiling(device: str) -> CompileTry:
    """Compile a function of two operations, which the compiler makes one of, and run it.

    Raises:
        Exception: whatever the compiler raises.
    """
    given = torch.linspace(-2, 2, SIZE * SIZE, device=device).reshape(SIZE, SIZE)
    started = perf_counter()
    compiled = torch.compile(_function, fullgraph=True)(given)
    difference = (compiled - _function(given)).abs().max().item()
    return CompileTry(perf_counter() - started, difference)


def _function(given: Tensor) -> Tensor:
    return F.gelu(given) * 2 + given
