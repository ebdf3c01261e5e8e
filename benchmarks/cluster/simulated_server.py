"""`vecmill serve` whose forward passes sleep: `python -m benchmarks.cluster.simulated_server FIXED_MS US_PER_TOKEN`.

All else is the real server: HTTP, tokenizing, cache, scheduler, the engine's thread and its packing. Warm-up measures
the pass that is stated, so routing and batches go by it. A pass takes no core, and three servers run on two.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter, sleep

import torch
from torch import Tensor

from vecmill.__main__ import main
from vecmill.engine.forward import LoadedModel
from vecmill.models.packing import PackedBatch

VECTORS = 4096  # different ones; which one a text gets depends on its tokens alone


def simulate(fixed_seconds: float, seconds_per_token: float) -> None:
    """Have every model of this process sleep in its forward passes, and answer with vectors that are not its own."""

    def forward(self: LoadedModel, packed: PackedBatch, at_once: int = 1) -> Tensor:
        began = perf_counter()
        tokens = packed.input_ids.shape[1]
        width = self.card.dimensions or 1
        if width not in tables:
            tables[width] = torch.randn(VECTORS, width, generator=torch.Generator().manual_seed(0))
        sums = torch.cat((torch.zeros(1, dtype=torch.int64), packed.input_ids[0].cumsum(0)))
        ends = packed.cu_seqlens.long()
        of_rows = (sums[ends[1:]] - sums[ends[:-1]])[packed.segments]
        answers = tables[width][of_rows % VECTORS]
        sleep(max(0.0, began + fixed_seconds + seconds_per_token * tokens - perf_counter()))
        return answers

    tables: dict[int, Tensor] = {}
    LoadedModel.forward = forward  # type: ignore[method-assign]


PASS = "SIMULATED_PASS"  # the environment's variable for the hook: FIXED_MS,US_PER_TOKEN


def in_workers_of_ray() -> None:
    """In a process of Ray: passes sleep as those of a server alone. Also Ray's `worker_process_setup_hook`."""
    fixed_ms, us_per_token = map(float, os.environ[PASS].split(","))
    simulate(fixed_ms / 1e3, us_per_token / 1e6)


if __name__ == "__main__":
    simulate(float(sys.argv[1]) / 1e3, float(sys.argv[2]) / 1e6)
    sys.argv = ["vecmill", "serve", *sys.argv[3:]]
    main()
