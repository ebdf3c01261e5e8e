"""One call on a machine with a GPU: what must be true there first, then how fast it is against the card's own limits.

It proves values, rotary angles, captured passes, the engine under overlap and real HTTP with a person beside bulk; and
that DETERMINISTIC=true keeps each row's bits, with how far batches move vectors without it and what it costs. Then it
measures Qwen3-Embedding-0.6B and -4B, BERT-base and NV-Embed-v2 with random weights drawn on the device: forward
passes of 16 to 16,384 tokens, eager, compiled and in CUDA graphs, as a share of a large matmul timed beside them; one
query against the time in which its weights are read; and the texts per second beside sentence-transformers on the same
weights. Then fp8 beside bfloat16, and last, what it costs bulk that interactive work goes first. Nothing is downloaded.

Every stage is a process of its own with a time limit, in the order of its value, and keeps what it finds as soon as it
finds it, in the folder that OUT names (else a temporary one): a run that is cut off at any second loses nothing. What
there is no time for is skipped and named. Needs torch, transformers, numpy, psutil, rich and safetensors, and no
installed vecmill; the stages that need more say so before they start:

    PYTHONPATH=src:. OUT=/tmp/found python -m benchmarks.gpu
    python -m benchmarks.gpu --stages values,engine
    python -m benchmarks.gpu --tiny --no-store    # tiny models on a CPU: whether it works, not how fast
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import benchmarks.lib.threads  # noqa: F401  # before torch
import psutil
import torch
from benchmarks.gpu.determinism import determinism_of_models
from benchmarks.gpu.forward import Timing, measure_forwards, read_rate, timed
from benchmarks.gpu.fp8 import fp8_beside_bfloat16, print_fp8
from benchmarks.gpu.lanes import lane_cost
from benchmarks.gpu.proofs import engine_overlap, person_beside_bulk, run_values
from benchmarks.gpu.reference import compare
from benchmarks.gpu.report import (
    bits_targets,
    print_determinism,
    print_lanes,
    print_machine,
    print_model,
    print_stages,
    print_targets,
    targets,
)
from benchmarks.gpu.stages import Stages, describe_card, sampled
from benchmarks.gpu.subjects import FULL, TINY, GpuSizes, Subject, make, read_side
from benchmarks.lib.host import describe_host
from benchmarks.lib.results import keep_so_far, publish
from benchmarks.lib.timing import LIMITS, Machine
from benchmarks.models.shapes import Shape
from rich.console import Console

from vecmill.engine.device import choose_dtype, configure_device, describe, dtype_name
from vecmill.models.weights import Target

MEMORY_FRACTION = 0.9  # the default of MEMORY_FRACTION
BUILD_SECONDS = 5.0
SERVER = ("pydantic", "pydantic_settings", "fastapi", "uvicorn", "orjson", "isal", "httpx2", "typer")


@dataclass(frozen=True)
class Stage:
    """A part of the run that has a process of its own."""

    name: str
    seconds: float
    """The process is ended after so many."""
    needs: Sequence[str] = ()
    """Modules that it needs in addition to those that every stage needs."""

    @property
    def file(self) -> str:
        """The name of the file that its process stores results in, without `.json`."""
        return f"gpu-{re.sub('[^a-z0-9]+', '-', self.name.lower())}"


PROOFS = (
    Stage("values", 90),
    Stage("engine", 120, ("pydantic", "pydantic_settings")),
    Stage("http", 120, SERVER),
)
DETERMINISM = Stage("determinism", 100, ("pydantic", "pydantic_settings"))
LANES = Stage("lanes", 150, ("pydantic", "pydantic_settings"))
FP8 = Stage("fp8", 110)
MODEL_SECONDS = 110.0


def stages_of(sizes: GpuSizes) -> list[Stage]:
    """All stages, the most valuable first."""
    models = (Stage(name, MODEL_SECONDS, ("sentence_transformers",)) for name in sizes.models)
    return [*PROOFS, DETERMINISM, *models, FP8, LANES]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="bound on the whole run (default: %(default)s)")
    parser.add_argument("--stages", help="only these, by name, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU unless --device says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, or cpu with --tiny")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="default: auto, float32 with --tiny")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --tiny")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_rates(machine: Machine, dtype: torch.dtype, sizes: GpuSizes) -> dict[str, Any]:
    """TFLOP/s of a large matmul; GB/s of a copy, read and written, and of a read."""
    sides = {"read": read_side(sizes.copy_bytes, machine.device)}
    timings = timed("the machine", machine, dtype, sides)
    return {**timings["limits"], "read_gb_per_s": read_rate(timings["sides"]["read"]["ms"], sizes.copy_bytes)}


def empty_result(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A model's entry in the results before anything is measured."""
    nothing = dict.fromkeys(("weight_gb", "matrix_products", "compile", "graphs", "chosen", "against"))
    return {"name": name, "dtype": dtype_name(dtype), "modes": {}, **nothing}


def measure_model(kind: str, shape: Shape, target: Target, timing: Timing, result: dict[str, Any]) -> None:
    """Add everything about one model to `result`. The model is freed before this returns."""
    torch._dynamo.reset()  # what was compiled for the model before
    name, stages = result["name"], timing.stages
    with TemporaryDirectory() as folder:
        build = partial(make, name, kind, shape, timing.sizes, target, Path(folder))
        subject: Subject | None = stages.run(f"{name}: build", BUILD_SECONDS, build)
        if subject is None:
            stages.skip(f"{name}: all else", "there is no model to measure")
            return
        result["weight_gb"] = subject.weight_bytes / 1e9
        measure_forwards(subject, timing, result)
        if result["chosen"] in result["modes"]:
            result["against"] = compare(subject, timing, result["modes"][result["chosen"]])
        else:
            stages.skip(f"{name}: against sentence-transformers", "its forward passes were not measured")


def measure(name: str, options: argparse.Namespace, sizes: GpuSizes, device: torch.device, started: float) -> bool:
    """Measure one model, printing and storing each result. True if no stage failed."""
    machine = Machine(device, options.rounds or sizes.rounds, sizes.seconds, sizes.matmul_size, sizes.copy_bytes)
    wanted = options.dtype or ("float32" if options.tiny else "auto")
    dtype = choose_dtype(wanted, device, 1024).dtype
    record: dict[str, Any] = {"card": describe_card(device), "dtype": dtype_name(dtype), "rates": None}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    with sampled(device) as samples, torch.inference_mode():
        stages = Stages(
            started + 60 * options.minutes,
            device,
            samples,
            keep=lambda: keep_so_far(options.child, {**record, "stages": stages.records}),
        )
        need = (machine.rounds + 2) * (len(LIMITS) + 1) * sizes.seconds
        record["rates"] = stages.run("rates", need, partial(measure_rates, machine, dtype, sizes))
        if record["rates"] is None:
            stages.skip(name, "the machine's rates are not known")
        else:
            timing = Timing(stages, machine, sizes, 1e12 * record["rates"]["matmul_tflops"]["median"])
            record["model"] = empty_result(name, dtype)
            kind, shape = sizes.models[name]
            # Guarded: an error keeps the results that were there before it.
            stages.guard(name, partial(measure_model, kind, shape, Target(dtype, device), timing, record["model"]))
            print_machine(console, record)
            print_model(console, record["model"])
    print_stages(console, stages.records)
    record["stages"] = stages.records
    keep_so_far(options.child, record)
    return not stages.failed


def prove(name: str, options: argparse.Namespace, sizes: GpuSizes, device: torch.device, started: float) -> bool:
    """Run one stage of proofs, printing and storing each result. True if every proof holds and nothing failed."""
    results: dict[str, Any] = {}

    def store() -> None:
        keep_so_far(options.child, {"proofs": results, "stages": stages.records})

    def keep(proof: str, seen: dict[str, Any]) -> None:
        results[proof] = seen
        store()
        print(f"{'ok  ' if seen['ok'] else 'FAIL'} {name}: {proof}: {json.dumps(seen)[:600]}", flush=True)

    stages = Stages(started + 60 * options.minutes, device, [], store)
    if name == "values":
        with torch.inference_mode():
            run_values(device, keep)
    elif name == "engine":
        engine_overlap(device, keep)
    elif name == DETERMINISM.name:
        rounds = options.rounds or (2 if options.tiny else 3)
        determinism_of_models(device, keep, stages, sizes, rounds)
        store()
    elif name == FP8.name:
        fp8_beside_bfloat16(device, keep, tiny=options.tiny, rounds=options.rounds or (2 if options.tiny else 4))
    elif name == LANES.name:
        rounds = options.rounds or (2 if options.tiny else 4)
        lane_cost(device, keep, tiny=options.tiny, rounds=rounds, seconds=0.2 if options.tiny else 3)
    else:
        person_beside_bulk(device, keep, tiny=options.tiny, seconds=1 if options.tiny else 4)
    return all(seen["ok"] for seen in results.values()) and not stages.failed


def child(name: str, options: argparse.Namespace, device: torch.device, started: float) -> int:
    """Run one stage in this process. Returns the exit status."""
    configure_device(device, MEMORY_FRACTION)
    sizes = TINY if options.tiny else FULL
    if name in sizes.models:
        return 0 if measure(name, options, sizes, device, started) else 1
    return 0 if prove(name, options, sizes, device, started) else 1


def run_stage(stage: Stage, arguments: Sequence[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Run a stage in a process of its own. Returns how it ended and what it stored, even if it was cut off."""
    missing = [module for module in stage.needs if find_spec(module) is None]
    if missing:
        return {"stage": stage.name, "status": "skipped", "reason": f"needs the Python packages {', '.join(missing)}"}
    limit = min(stage.seconds, seconds)
    if limit < 5:
        return {"stage": stage.name, "status": "skipped", "reason": "there was no time left"}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    command += ["--stages", stage.name, "--child", stage.file, "--minutes", str((limit - 2) / 60)]
    started = time.perf_counter()
    try:
        status = subprocess.run(
            command, env={**os.environ, "OUT": str(folder)}, timeout=limit, check=False, stdin=subprocess.DEVNULL
        ).returncode
        ended = {"status": "done"} if status == 0 else {"status": "failed", "reason": f"it ended with status {status}"}
    except subprocess.TimeoutExpired:
        ended = {"status": "failed", "reason": f"cut off after {limit:.0f} s"}
    record = {"stage": stage.name, **ended, "seconds": round(time.perf_counter() - started, 1)}
    kept = folder / f"{stage.file}.json"
    return {**record, **({"found": json.loads(kept.read_text())} if kept.exists() else {})}


def settings(options: argparse.Namespace, device: torch.device, sizes: GpuSizes) -> Mapping[str, Any]:
    """The settings that the figures depend on."""
    return {
        "device": describe(device),
        "tiny": options.tiny,
        "minutes": options.minutes,
        "rounds": options.rounds or sizes.rounds,
        "seconds": sizes.seconds,
        "compile_backend": sizes.compile_backend,
    }


def summary_of(records: Sequence[Mapping[str, Any]], sizes: GpuSizes) -> dict[str, Any]:
    """Models, proofs, targets and how each stage ended, from what the stages stored."""
    kept = [record["found"] for record in records if "found" in record]
    models = [each["model"] for each in kept if each.get("model")]
    first: Mapping[str, Any] = next((each for each in kept if each.get("rates")), {})
    proved = [record for record in records if "proofs" in record.get("found", {})]
    proofs = {record["stage"]: record["found"]["proofs"] for record in proved}
    return {
        "card": first.get("card"),
        "dtype": first.get("dtype"),
        "rates": first.get("rates"),
        "proofs": proofs,
        "models": models,
        "targets": [*targets(models, sizes.first, sizes.busy_tokens), *bits_targets(proofs.get(DETERMINISM.name, {}))],
        "stages": [
            *({key: record[key] for key in record if key != "found"} for record in records),
            *(stage for each in kept for stage in each.get("stages", ())),
        ],
        "same_vectors": all(model["against"]["same"] for model in models if model["against"]),
    }


def main(arguments: Sequence[str] | None = None, already: float = 0.0) -> int:
    """Prove, measure, print, store; status 1 where a stage failed or vectors differ. `already`: seconds gone before."""
    started = time.perf_counter() - already
    options = parse_arguments(arguments)
    sizes = TINY if options.tiny else FULL
    on_gpu = (options.device or ("cpu" if options.tiny else "cuda")) == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("There is no CUDA GPU here; --tiny shows on a CPU that the benchmark works.", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if options.child:
        return child(options.stages, options, device, started)
    wanted = options.stages.split(",") if options.stages else None
    chosen = [stage for stage in stages_of(sizes) if wanted is None or stage.name in wanted]
    passed_on = [word for word in (arguments if arguments is not None else sys.argv[1:]) if word != "--no-store"]
    records = []
    with TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("OUT") or temporary)
        for stage in chosen:
            print(f"== {stage.name}", flush=True)
            left = started + 60 * options.minutes - time.perf_counter()
            records.append(run_stage(stage, passed_on, folder, left))
    summary = summary_of(records, sizes)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if DETERMINISM.name in summary["proofs"]:
        print_determinism(console, summary["proofs"][DETERMINISM.name])
    if FP8.name in summary["proofs"]:
        print_fp8(console, summary["proofs"][FP8.name])
    if "lanes" in summary["proofs"]:
        print_lanes(console, summary["proofs"]["lanes"]["lanes"])
    print_targets(console, summary["targets"])
    for record in records:
        console.print(f"{record['stage']}: {record['status']} {record.get('reason', '')}", soft_wrap=True)
    result = {
        "host": describe_host(),
        "settings": settings(options, device, sizes),
        **summary,
        "seconds": round(time.perf_counter() - started, 1),
    }
    publish("gpu", result, store=not options.no_store)
    failed = any(record["status"] == "failed" for record in records)
    return 1 if failed or not summary["same_vectors"] else 0


if __name__ == "__main__":
    # What torch and transformers took to import counts.
    sys.exit(main(already=time.time() - psutil.Process().create_time()))
