"""Texts per second of vecmill and of the servers it may replace: same weights, same texts, each at its best.

Compared are a server as people write it by hand (`reference`), Infinity and vLLM, the last two from their packages in
environments that the first run makes; and in process, for scale, vecmill's model code without a server (the packed
loop), sentence-transformers, and OpenVINO and ONNX Runtime with texts sorted by length or in the packed loop's batches.
Each round starts one server at a time, warms it up, sends it functions and classes of Python's standard library over
several connections, and stops it again. The rounds alternate; a pass during which other programs used the processor is
repeated.

    python -m benchmarks.serving.throughput
    python -m benchmarks.serving.throughput --servers vecmill,reference
    python -m benchmarks.serving.throughput --vllm="VLLM_CPU_NUM_OF_RESERVED_CPU=0 --runner pooling --dtype bfloat16"
    python -m benchmarks.serving.throughput --serve --dtype float32   # all after --serve goes to `vecmill serve`

Ends with status 1 where vecmill was not measured or two sides' vectors differ; a target that is missed is only told.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from benchmarks.lib.figures import print_disturbance, significant, spread
from benchmarks.lib.host import describe_host
from benchmarks.lib.minilm import sample_texts, tokenize
from benchmarks.lib.results import publish
from benchmarks.serving.peers import add_server_options, wanted
from benchmarks.serving.throughput_rounds import (
    IN_PROCESS,
    PACKED,
    ThroughputPass,
    ThroughputPlan,
    ThroughputResults,
    measure_rounds,
)
from rich.console import Console
from rich.table import Table

OURS = "vecmill"
TARGETS: Mapping[str, float] = {
    **{"reference": 5.0, "infinity": 4.0, "infinity-float32": 4.0, "vllm": 1.3, PACKED: 0.85},
    **{"openvino, sorted": 0.9, "openvino, arrival": 1.2},
}
"""The least ratio of vecmill's rate to each side's, on 2 cores."""
MIN_COSINE = 0.999
ABOUT_PACKED = ("matmul_flops", "operations", "seconds")


def summarise(results: ThroughputResults, texts: int, tokens: int) -> dict[str, Any]:
    """The results as they are stored."""
    passes = {name: each for name, each in results.passes.items() if each}
    limit = _limit(passes.get(PACKED, ()), tokens)
    ratios = {
        name: _ratio(name, passes[OURS], each) for name, each in passes.items() if OURS in passes and name != OURS
    }
    return {
        "sides": {name: _side(each, texts, tokens, limit) for name, each in passes.items()},
        "ratios": ratios,
        "limit": limit,
        "min_cosines": _cosines(passes),
        "failed": dict(results.failed),
    }


def _side(passes: Sequence[ThroughputPass], texts: int, tokens: int, limit: Mapping[str, Any] | None) -> dict[str, Any]:
    rates = [tokens / each.seconds for each in passes]
    result: dict[str, Any] = {
        "about": {key: value for key, value in passes[-1].about.items() if key not in ABOUT_PACKED},
        "texts_per_s": spread([texts / each.seconds for each in passes]),
        "tokens_per_s": spread(rates),
        "other_cores": spread([each.other_cores for each in passes]),
    }
    if limit is not None:
        limits = limit["tokens_per_s"]["rounds"]
        result["of_limit"] = spread([rate / most for rate, most in zip(rates, limits, strict=False)])
    return result


def _limit(packed: Sequence[ThroughputPass], tokens: int) -> dict[str, Any] | None:
    """The texts' tokens per second if the model did all its operations as fast as a large matmul."""
    if not packed:
        return None
    about = packed[-1].about
    per_token = about["operations"] / tokens
    rates = [float(each.about["matmul_flops"]) for each in packed]
    return {
        "dtype": about["dtype"],
        "matmul_tflops": spread([rate / 1e12 for rate in rates]),
        "mflop_per_token": significant(per_token / 1e6),
        "tokens_per_s": spread([rate / per_token for rate in rates]),
    }


def _ratio(name: str, ours: Sequence[ThroughputPass], theirs: Sequence[ThroughputPass]) -> dict[str, Any]:
    # A side that failed in a later round has fewer passes; those it has are of the first rounds.
    result = spread([their_pass.seconds / our_pass.seconds for our_pass, their_pass in zip(ours, theirs, strict=False)])
    if name in TARGETS:
        result |= {"target": TARGETS[name], "met": result["median"] >= TARGETS[name]}
    return result


def _cosines(passes: Mapping[str, Sequence[ThroughputPass]]) -> dict[str, float]:
    """Each side's lowest cosine to vecmill's vectors, or to those of the first side if vecmill is not among them."""
    first = passes[OURS][0] if OURS in passes else next(iter(passes.values()))[0]
    return {
        name: round(min(lowest_cosine(repetition.sample, first.sample) for repetition in each), 6)
        for name, each in passes.items()
    }


def lowest_cosine(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    """The lowest cosine between two sides' vectors of the same texts; -1 where a value is not finite."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.nan_to_num(np.sum(first * second, axis=1) / norms, nan=-1.0).min())


def agrees(summary: Mapping[str, Any]) -> bool:
    """Whether all sides give the same vectors."""
    return all(cosine >= MIN_COSINE for cosine in summary["min_cosines"].values())


def print_summary(summary: Mapping[str, Any], texts: int, tokens: int) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(_table(summary, f"{texts:,} texts, {tokens:,} tokens"))
    if limit := summary["limit"]:
        tflops, most = limit["matmul_tflops"], limit["tokens_per_s"]
        console.print(
            f"The machine's limit: {most['median']:,.0f} tokens/s ({most['min']:,.0f} to {most['max']:,.0f}), from a "
            f"large matmul in {limit['dtype']} at {tflops['median']:.4g} TFLOP/s and "
            f"{limit['mflop_per_token']:.4g} MFLOP per token",
            soft_wrap=True,
        )
    console.print(
        f"{PACKED}: vecmill's model code in one process, texts tokenized before; {IN_PROCESS}: without a server, all "
        f"texts in one call",
        soft_wrap=True,
    )
    for name, reason in summary["failed"].items():
        # The last line of a log is the error; all of it is in the JSON.
        console.print(f"{name} failed: {reason.splitlines()[-1]}", markup=False, soft_wrap=True)
    print_disturbance(console, max(side["other_cores"]["max"] for side in summary["sides"].values()))
    if not agrees(summary):
        console.print(f"The vectors differ: a cosine below {MIN_COSINE}.")


def _table(summary: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("side", "dtype"):
        table.add_column(heading, no_wrap=True)
    table.add_column("texts/s (min to max)", justify="right")
    for heading in ("tokens/s", "of limit", "vecmill / side", "target", "cosine"):
        table.add_column(heading, justify="right")
    for name, side in summary["sides"].items():
        rate, of_limit = side["texts_per_s"], side.get("of_limit")
        table.add_row(
            name,
            str(side["about"].get("dtype")),
            f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
            f"{side['tokens_per_s']['median']:,.0f}",
            f"{of_limit['median']:.1%}" if of_limit else "",
            *_ratio_cells(summary["ratios"].get(name)),
            f"{summary['min_cosines'][name]:.5f}",
        )
    for name in summary["failed"]:
        table.add_row(name, "failed", "see below")
    return table


def _ratio_cells(ratio: Mapping[str, Any] | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    target = f"{ratio['target']:g} {'met' if ratio['met'] else 'MISSED'}" if "target" in ratio else ""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", target


def parse_arguments() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=200, help="texts before each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side (default: %(default)s)")
    parser.add_argument(
        "--retries", type=int, default=5, help="passes repeated when other programs were busy (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=12, help="no round begins that would end later (default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="texts per request (default: %(default)s)")
    parser.add_argument("--no-runtimes", action="store_true", help="leave out OpenVINO and ONNX Runtime")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    add_server_options(parser)
    return parser.parse_args()


def main() -> int:
    """Measure, print, store; the exit status."""
    options = parse_arguments()
    servers = wanted(options)
    texts = sample_texts(options.texts)
    tokens = sum(map(len, tokenize(servers.model_folder, texts)))
    plan = ThroughputPlan(
        texts,
        options.warm_up,
        options.connections,
        options.batch,
        options.rounds,
        options.retries,
        options.minutes,
        runtimes=not options.no_runtimes,
    )
    summary = summarise(measure_rounds(options.servers, servers, plan), len(texts), tokens)
    print_summary(summary, len(texts), tokens)
    settings: dict[str, Any] = {
        key: getattr(options, key) for key in ("servers", "warm_up", "connections", "batch", "serve")
    }
    about = {"texts": len(texts), "tokens": tokens, "repeated": plan.repeated, **settings}
    publish(
        "throughput",
        {"host": describe_host(), "settings": about, **summary, "same_vectors": agrees(summary)},
        store=not options.no_store,
    )
    return 0 if OURS in summary["sides"] and agrees(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
