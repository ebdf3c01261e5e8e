"""Forward passes of one model, eager and compiled: seconds, share of the matmul rate, and the budget from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from benchmarks.gpu.stages import Stages
from benchmarks.gpu.subjects import (
    MAX_ROWS,
    READ,
    WITH_PACKING,
    GpuSizes,
    Subject,
    estimate,
    forwards,
    matrix_products,
    one_forward,
)
from benchmarks.lib.figures import significant, spread
from benchmarks.lib.results import progress
from benchmarks.lib.timing import LIMITS, Machine, TimedSide, alternate, report
from benchmarks.models.workloads import first_tokens

from vecmill.core.calibration import fit
from vecmill.engine.compilation import MEASURED_TOKENS, Run, choose, compilations, compile_layers, make_eager
from vecmill.engine.cuda_graphs import shape_of
from vecmill.models.packing import pack

MAX_BATCH_SECONDS = 0.1  # the setting MAX_BATCH_MS
GRAPHS = "graphs"
COMPILE_SECONDS = 15.0  # what inductor takes for one layer, and the choice; 5 s were seen on an H100
CAPTURE_SECONDS = 20.0
START_SECONDS = 5.0


@dataclass(frozen=True)
class Timing:
    """How forward passes are measured."""

    stages: Stages
    machine: Machine
    sizes: GpuSizes
    matmul_rate: float
    """Floating-point operations per second, for estimates of time."""

    def needs(self, sides: Mapping[str, TimedSide]) -> float:
        """Seconds that `timed` takes, about."""
        return START_SECONDS + estimate(sides, self.machine.rounds, self.machine.seconds, self.matmul_rate)


def timed(
    label: str, machine: Machine, dtype: torch.dtype, sides: Mapping[str, TimedSide], items: int = 1
) -> dict[str, Any]:
    """`report`, and the milliseconds of each side; the matmul and the copy are timed in the same rounds."""
    with progress(label, machine.rounds * (len(sides) + len(LIMITS))) as advance:
        rounds = alternate(replace(machine, advance=advance), dtype, sides)
    result = report(machine, dtype, sides, rounds, items)
    for name, side in result["sides"].items():
        side["ms"] = spread([1000 * each for each in rounds.seconds[name]])
    return result


def read_rate(milliseconds: Mapping[str, Any], size: int) -> dict[str, Any]:
    """GB/s in each round of a read of so many bytes."""
    return spread([size / 1e6 / each for each in milliseconds["rounds"]])


def measure_forwards(subject: Subject, timing: Timing, result: dict[str, Any]) -> None:
    """Add to `result` the measurements of every way to run the model, and which way the server chooses; leave it so."""
    stages, sizes = timing.stages, timing.sizes
    sides = forwards(subject, sizes)
    products = {str(tokens): matrix_products(subject, tokens) for tokens in sizes.matrix_tokens}
    modes: dict[str, Any] = {}
    result["modes"] = modes
    stage = f"{subject.name}: eager"
    _put(modes, "eager", stages.run(stage, timing.needs(sides), partial(_mode, subject, timing, sides, "eager")))
    stage = f"{subject.name}: its matrix products alone"
    result["matrix_products"] = stages.run(stage, timing.needs(products), partial(_products, subject, timing, products))
    stage = f"{subject.name}: compile"
    result["compile"] = stages.run(stage, COMPILE_SECONDS, partial(_compile, subject, sizes.compile_backend))
    stage = f"{subject.name}: compiled"
    if result["compile"] is None:
        stages.skip(stage, "the layers are not compiled")
    else:
        compiled = partial(_mode, subject, timing, sides, "compiled")
        _put(modes, "compiled", stages.run(stage, timing.needs(sides), compiled))
    result["chosen"] = "compiled" if "compiled" in modes and result["compile"]["compiled"] else "eager"
    if result["chosen"] == "eager":
        make_eager(subject.model.layers)
    if subject.stream is not None:
        stage = f"{subject.name}: capture"
        result["graphs"] = stages.run(stage, CAPTURE_SECONDS, partial(_capture, subject, max(sizes.tokens)))
        if subject.graphs.passes:
            in_graphs = forwards(subject, sizes)
            run = partial(_mode, subject, timing, in_graphs, GRAPHS)
            _put(modes, GRAPHS, stages.run(f"{subject.name}: {GRAPHS}", timing.needs(in_graphs), run))
        result["chosen"] = GRAPHS if GRAPHS in modes else result["chosen"]


def _capture(subject: Subject, largest: int) -> dict[str, Any]:
    subject.capture(largest)
    graphs = subject.graphs
    return {
        "count": len(graphs.passes),
        "reason": graphs.reason,
        "memory_gb": significant(graphs.memory_bytes / 1e9),
        "gains": [
            {
                "tokens": gain.tokens,
                "direct_ms": significant(1e3 * gain.direct_seconds),
                "graph_ms": significant(1e3 * gain.graph_seconds),
            }
            for gain in graphs.gains
        ],
        "equal": _equal(subject),
    }


def _equal(subject: Subject) -> dict[str, float]:
    """Least cosine of batches in graphs to the same batches launched kernel by kernel, by tokens."""
    least = {}
    for tokens in (16, 100, 1000, 4000):
        rows = first_tokens(subject.texts, tokens)
        if subject.graphs.shape_for(rows) is not None:
            direct = pack(rows, subject.target.device, attention=subject.attention)
            wanted = subject.model.forward(direct).cpu()
            # Both are in packed order, the same for both.
            cosines = torch.nn.functional.cosine_similarity(subject.run(subject.pack(rows)), wanted, dim=1)
            least[str(tokens)] = float(cosines.nan_to_num(nan=-1).min())
    return least


def _put(modes: dict[str, Any], mode: str, measured: dict[str, Any] | None) -> None:
    if measured is not None:
        modes[mode] = measured


def _compile(subject: Subject, backend: str) -> dict[str, Any]:
    """Choose between compiled and eager layers as the server does at warm-up; compile them in either case."""
    run = partial(one_forward, subject)
    before = compilations()
    choice = choose(subject.model, "auto", run, backend, _replays(subject) if subject.stream is not None else None)
    graphs = compilations() - before
    if not choice.compiled:
        compile_layers(subject.model.layers, run, backend)
    return {"compiled": choice.compiled, "reason": choice.reason, "backend": backend, "graphs": graphs}


def _replays(subject: Subject) -> Callable[[], Run]:
    """A function that captures graphs of the layers as they are when it is called, and returns how to time a replay."""

    def prepare() -> Run:
        capture = subject.capturing
        passes, packs = {}, {}
        for tokens in MEASURED_TOKENS:
            shape = shape_of(tokens, MAX_ROWS)
            passes[tokens] = capture(shape)
            with torch.cuda.stream(subject.stream):
                rows = first_tokens(subject.texts, tokens)
                packs[tokens] = pack(rows, subject.target.device, shape=shape, attention=subject.attention)

        def run(tokens: int) -> float:
            started = perf_counter()
            with torch.cuda.stream(subject.stream):
                passes[tokens](packs[tokens]).cpu()
            return perf_counter() - started

        return run

    return prepare


def _products(subject: Subject, timing: Timing, sides: Mapping[str, TimedSide]) -> dict[str, Any]:
    result = timed(f"{subject.name}, matrix products", timing.machine, subject.target.dtype, sides)
    rate = result["limits"]["matmul_tflops"]["median"]
    return {
        tokens: {
            "ms": side["ms"],
            "of_matmul": side["of_matmul"],
            "tflops": significant(side["of_matmul"]["median"] * rate),
            "weights_gb_per_s": significant(subject.weight_bytes / 1e6 / side["ms"]["median"]),
        }
        for tokens, side in result["sides"].items()
    }


def _mode(subject: Subject, timing: Timing, sides: Mapping[str, TimedSide], mode: str) -> dict[str, Any]:
    before = compilations()
    result = timed(f"{subject.name}, {mode}", timing.machine, subject.target.dtype, sides)
    read_gb_per_s = read_rate(result["sides"][READ]["ms"], timing.sizes.copy_bytes)
    measured = {int(name): side for name, side in result["sides"].items() if name not in (READ, WITH_PACKING)}
    calibration = fit([(tokens, side["ms"]["min"] / 1000) for tokens, side in measured.items()])
    return {
        "forwards": [
            {
                "tokens": tokens,
                "ms": side["ms"],
                "tokens_per_s": significant(1000 * tokens / side["ms"]["median"]),
                "of_matmul": side["of_matmul"],
            }
            for tokens, side in measured.items()
        ],
        "fit": {
            "fixed_ms": significant(1000 * calibration.fixed_seconds),
            "us_per_token": significant(1e6 * calibration.seconds_per_token),
            "knee_tokens": calibration.knee_tokens,
            "max_batch_ms": 1000 * MAX_BATCH_SECONDS,
            "budget_tokens": calibration.bulk_tokens(MAX_BATCH_SECONDS, max(timing.sizes.tokens)),
        },
        "query": _query(subject, result, str(timing.sizes.tokens[0]), read_gb_per_s["median"]),
        "limits": {**result["limits"], "read_gb_per_s": read_gb_per_s},
        "new_graphs": compilations() - before,
        "other_cores": result["other_cores"],
    }


def _query(subject: Subject, result: Mapping[str, Any], name: str, read_gb_per_s: float) -> dict[str, Any]:
    """The times of one search query, beside the time to read its weights at the rate of a plain sum and of a copy."""
    times, copied_gb_per_s = result["sides"][name]["ms"], result["limits"]["copy_gb_per_s"]["median"]
    read, copied = (subject.weight_bytes / 1e6 / rate for rate in (read_gb_per_s, copied_gb_per_s))
    return {
        "ms": times,
        "packed_anew_ms": result["sides"][WITH_PACKING]["ms"],
        "weight_bytes": subject.weight_bytes,
        "read_limit_ms": significant(read),
        "copy_limit_ms": significant(copied),
        "times_read_limit": significant(times["median"] / read),
        "times_copy_limit": significant(times["median"] / copied),
    }
