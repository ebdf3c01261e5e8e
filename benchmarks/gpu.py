"""Full-size models of random weights on a GPU, against its own limits and against sentence-transformers.

Qwen3-Embedding-4B and -0.6B and NV-Embed-v2, drawn on the device one after the other; random token ids in the lengths
of code chunks. Nothing is downloaded and no tokenizer is used. Of each model: forward passes of 16 to 16,384 tokens,
eager and compiled, as a share of a large matmul timed beside them; one query against the time in which its weights are
read; and the texts per second beside sentence-transformers on the same weights. What there is no time for is skipped
and named. Needs torch, transformers, sentence-transformers, psutil and rich, and no installed vecmill:

    PYTHONPATH=src:. python -m benchmarks.gpu
    python -m benchmarks.gpu --tiny --no-store    # tiny models on a CPU: whether it works, not how fast
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import benchmarks.model_threads  # noqa: F401  # before torch
import psutil
import torch
from benchmarks.gpu_card import describe_card, sampled
from benchmarks.gpu_forward import Timing, measure_forwards, read_rate, timed
from benchmarks.gpu_model import Subject, make, read_side
from benchmarks.gpu_reference import compare
from benchmarks.gpu_report import print_machine, print_model, print_stages, print_targets, targets
from benchmarks.gpu_sizes import FULL, TINY, GpuSizes
from benchmarks.gpu_stages import Stages
from benchmarks.host import describe_host
from benchmarks.model_rounds import LIMITS, Machine
from benchmarks.model_shapes import Shape
from benchmarks.results import keep_so_far, publish
from rich.console import Console

from vecmill.engine.device import configure_device, describe
from vecmill.engine.dtype import choose_dtype, dtype_name
from vecmill.models.weights import Target

MEMORY_FRACTION = 0.9  # the default of MEMORY_FRACTION
BUILD_SECONDS = 30.0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="bound on the whole run (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU unless --device says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, or cpu with --tiny")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="default: auto, float32 with --tiny")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --tiny")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    return parser.parse_args(arguments)


def measure_rates(machine: Machine, dtype: torch.dtype, sizes: GpuSizes) -> dict[str, Any]:
    """TFLOP/s of a large matmul; GB/s of a copy, read and written, and of a read."""
    sides = {"read": read_side(sizes.copy_bytes, machine.device)}
    found = timed("the machine", machine, dtype, sides)
    return {**found["limits"], "read_gb_per_s": read_rate(found["sides"]["read"]["ms"], sizes.copy_bytes)}


def empty_result(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a model's entry holds before anything of it is measured."""
    nothing = dict.fromkeys(("weight_gb", "matrix_products", "compile", "chosen", "against"))
    return {"name": name, "dtype": dtype_name(dtype), "modes": {}, **nothing}


def measure_model(kind: str, shape: Shape, target: Target, timing: Timing, found: dict[str, Any]) -> None:
    """Put everything about one model into `found`; the model is gone when this returns."""
    torch._dynamo.reset()  # what was compiled for the model before
    name, stages = found["name"], timing.stages
    with TemporaryDirectory() as folder:
        build = partial(make, name, kind, shape, timing.sizes, target, Path(folder))
        subject: Subject | None = stages.run(f"{name}: build", BUILD_SECONDS, build)
        if subject is None:
            stages.skip(f"{name}: all else", "there is no model to measure")
            return
        found["weight_gb"] = subject.weight_bytes / 1e9
        measure_forwards(subject, timing, found)
        if found["chosen"] in found["modes"]:
            found["against"] = compare(subject, timing, found["modes"][found["chosen"]])
        else:
            stages.skip(f"{name}: against sentence-transformers", "its forward passes were not measured")


def measure(
    options: argparse.Namespace,
    sizes: GpuSizes,
    device: torch.device,
    stages: Stages,
    console: Console,
    found: dict[str, Any],
) -> None:
    """Put the machine's rates and every model into `found`, printed as they come."""
    machine = Machine(device, options.rounds or sizes.rounds, sizes.seconds, sizes.matmul_size, sizes.copy_bytes)
    wanted = options.dtype or ("float32" if options.tiny else "auto")
    dtype = choose_dtype(wanted, device, 1024).dtype
    need = (machine.rounds + 2) * (len(LIMITS) + 1) * sizes.seconds
    rates = stages.run("rates", need, partial(measure_rates, machine, dtype, sizes))
    found.update({"card": describe_card(device), "dtype": dtype_name(dtype), "rates": rates, "models": []})
    print_machine(console, found)
    if rates is None:
        stages.skip("every model", "the machine's rates are not known")
        return
    timing = Timing(stages, machine, sizes, 1e12 * rates["matmul_tflops"]["median"])
    for name, (kind, shape) in sizes.models.items():
        one = empty_result(name, dtype)
        found["models"].append(one)
        # A target of its own: it keeps what was loaded. Guarded: what fails leaves what was found before.
        stages.guard(name, partial(measure_model, kind, shape, Target(dtype, device), timing, one))
        print_model(console, one)


def settings(options: argparse.Namespace, device: torch.device, sizes: GpuSizes) -> Mapping[str, Any]:
    """What the figures depend on."""
    return {
        "device": describe(device),
        "tiny": options.tiny,
        "minutes": options.minutes,
        "rounds": options.rounds or sizes.rounds,
        "seconds": sizes.seconds,
        "compile_backend": sizes.compile_backend,
    }


def main(arguments: Sequence[str] | None = None, already: float = 0.0) -> int:
    """Measure, print, store; status 1 where vectors differ or a stage failed. `already`: seconds gone before."""
    started = time.perf_counter() - already
    options = parse_arguments(arguments)
    sizes = TINY if options.tiny else FULL
    device = torch.device("cuda", 0) if (options.device or ("cpu" if options.tiny else "cuda")) == "cuda" else None
    if device is not None and not torch.cuda.is_available():
        print("There is no CUDA GPU here; --tiny shows on a CPU that the benchmark works.", file=sys.stderr)
        return 2
    device = device or torch.device("cpu")
    configure_device(device, MEMORY_FRACTION)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    found: dict[str, Any] = {}
    with sampled(device) as samples, torch.inference_mode():
        stages = Stages(
            started + 60 * options.minutes,
            device,
            samples,
            keep=lambda: keep_so_far("gpu", {**found, "stages": stages.records}),
        )
        measure(options, sizes, device, stages, console, found)
    wanted = targets(found["models"], next(iter(sizes.models)), sizes.busy_tokens)
    print_targets(console, wanted)
    print_stages(console, stages.records)
    same = all(model["against"]["same"] for model in found["models"] if model["against"])
    result = {
        "host": describe_host(),
        "settings": settings(options, device, sizes),
        **found,
        "targets": wanted,
        "stages": stages.records,
        "same_vectors": same,
        "seconds": round(time.perf_counter() - started, 1),
    }
    publish("gpu", result, store=not options.no_store)
    return 0 if same and not stages.failed else 1


if __name__ == "__main__":
    # What torch and transformers took to import counts.
    sys.exit(main(already=time.time() - psutil.Process().create_time()))
