"""The model's own code in a process of its own, without HTTP, scheduler or event loop: what a server could reach.

Reads a JSON list of texts on stdin, writes their vectors to a file and one line of JSON to stdout. Tokenization is
not timed. Beside the texts a large matmul is timed in the same process: the machine's limit.

    python -m benchmarks.serving.packed_loop --dtype bfloat16 --vectors vectors.npy < texts.json
"""

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarks.lib.threads  # noqa: F401  # before torch
import numpy as np
import numpy.typing as npt
import torch
from benchmarks.lib.minilm import bundled_model, tokenize
from benchmarks.lib.timing import Machine, alternate, limits
from benchmarks.models.cases import Given
from benchmarks.models.shapes import CPU, CUDA
from benchmarks.models.workloads import answers_of, batches, operations

from vecmill.config import load_settings
from vecmill.core.types import Row, Vector
from vecmill.engine.device import describe
from vecmill.engine.engine import LAUNCHED_AT_A_TIME
from vecmill.engine.forward import Device, Launched, LoadedModel, launch
from vecmill.engine.loader import load

LIMIT_SECONDS = 1.0


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations per second of a large matmul, measured for so long."""
    sizes = CPU if device.type == "cpu" else CUDA
    machine = Machine(device, 1, seconds, sizes.matmul_size, sizes.copy_bytes)
    (taken,) = alternate(machine, dtype, {}).seconds["matmul"]
    return limits(machine, dtype)["matmul"].operations / taken


def run(model: LoadedModel, packs: Sequence[Sequence[Row]], device: Device) -> npt.NDArray[np.float32]:
    """(N, width) in the rows' order: what the server's engine does, as many batches ahead."""
    answers: list[Vector] = []
    launched: deque[Launched] = deque()
    for rows in packs:
        if len(launched) == LAUNCHED_AT_A_TIME:
            answers += answers_of(launched.popleft())
        launched.append(launch(model, rows, device))
    for each in launched:
        answers += answers_of(each)
    return np.stack(answers)


@torch.inference_mode()
def measure(
    model_folder: Path, dtype: str, texts: Sequence[str], warm_up: int, limit_seconds: float
) -> tuple[npt.NDArray[np.float32], Mapping[str, Any]]:
    """The vectors, not normalised, and what JSON gets."""
    settings = load_settings({"embed_model": str(model_folder), "dtype": dtype})
    loaded = load(settings.model, settings.engine, lambda percent, doing: None)
    (served,) = loaded.models.values()
    rows = [Row(ids) for ids in tokenize(model_folder, texts)]
    # Packs in the texts' order, as a server gets them: it cannot sort what has not arrived.
    tokens = Given(CPU, loaded.device, dtype).batch_tokens
    packs = batches(rows, tokens)
    run(served, batches(rows[:warm_up], tokens), loaded.runs_on)
    rates = [matmul_rate(loaded.device, getattr(torch, dtype), limit_seconds)]
    started = time.perf_counter()
    vectors = run(served, packs, loaded.runs_on)
    seconds = time.perf_counter() - started
    rates.append(matmul_rate(loaded.device, getattr(torch, dtype), limit_seconds))
    return vectors, {
        "seconds": seconds,
        "device": describe(loaded.device),
        "batch_tokens": tokens,
        "packs": len(packs),
        "matmul_flops": statistics.mean(rates),
        "operations": operations(served.checkpoint.family.model_type, served.model, served.checkpoint.config, packs),
    }


def main() -> None:
    """Measure the texts on stdin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled MiniLM)")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=200, help="texts that do not count first (default: %(default)s)")
    parser.add_argument(
        "--limit-seconds", type=float, default=LIMIT_SECONDS, help="of the matmul (default: %(default)s)"
    )
    parser.add_argument("--vectors", type=Path, required=True, help="file that gets them, as NumPy's .npy")
    options = parser.parse_args()
    texts = json.load(sys.stdin)
    vectors, figures = measure(
        options.model or bundled_model(), options.dtype, texts, options.warm_up, options.limit_seconds
    )
    np.save(options.vectors, vectors)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
