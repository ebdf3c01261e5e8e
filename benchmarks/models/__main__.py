"""How fast the families' special paths are, against the plain way and against what this machine can do at most.

Random weights: full size on CUDA, less on a CPU. Each comparison first checks that its sides give the same numbers,
then times them in turns beside a large matmul and a large copy, so that every ratio is of neighbours in time. Last, a
checkpoint is written to a temporary folder and loaded in processes of their own, for their peak of memory.

    python -m benchmarks.models
    python -m benchmarks.models --quick    # tiny models: whether it works, not how fast
    python -m benchmarks.models --only families --rounds 3 --seconds 0
    python -m benchmarks.models --only ModernBERT-base
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import benchmarks.lib.threads  # noqa: F401  # before torch
import torch
from benchmarks.lib.figures import print_disturbance
from benchmarks.lib.host import describe_host
from benchmarks.lib.results import publish
from benchmarks.lib.timing import Machine
from benchmarks.models.cases import ONLY, Given, cases, measure
from benchmarks.models.loading import loading
from benchmarks.models.shapes import CPU, CUDA, QUICK, Sizes
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vecmill.engine.device import describe


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 with --quick")
    parser.add_argument("--seconds", type=float, help="of each side in each round (default: 1, or 0 with --quick)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="default: auto, float32 with --quick")
    parser.add_argument("--load-gb", type=float, help="size of the checkpoint (default: 4, or 8 with CUDA)")
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--only", choices=ONLY, help="only these comparisons, and no checkpoint is loaded")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    return parser.parse_args(arguments)


def machine_and_sizes(options: argparse.Namespace) -> tuple[Machine, Sizes]:
    """Where to run, and how much."""
    cuda = torch.cuda.is_available() and not options.quick
    sizes = QUICK if options.quick else CUDA if cuda else CPU
    machine = Machine(
        device=torch.device("cuda", 0) if cuda else torch.device("cpu"),
        rounds=options.rounds or (1 if options.quick else 5),
        seconds=(0.0 if options.quick else 1.0) if options.seconds is None else options.seconds,
        matmul_size=sizes.matmul_size,
        copy_bytes=sizes.copy_bytes,
    )
    return machine, sizes


def print_comparison(console: Console, comparison: dict[str, Any]) -> None:
    """Speeds, for people."""
    check = comparison["check"]
    same = "the same numbers" if check["same"] else "NOT THE SAME NUMBERS"
    apart = f"apart by {check['error']:.1e}, allowed {check['tolerance']:.0e}"
    title = f"{comparison['name']}: {comparison['dtype']}, {same} ({apart})"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in (f"{comparison['unit']}/s", "min to max", "first is faster by", "of matmul", "of limit"):
        table.add_column(heading, justify="right")
    for name, side in comparison["sides"].items():
        rate, ratio = side["per_s"], comparison["ratio"].get(name)
        table.add_row(
            name,
            rounded(rate["median"]),
            f"{rounded(rate['min'])} to {rounded(rate['max'])}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
            f"{side['of_matmul']['median']:.0%}",
            f"{side['of_limit']['median']:.0%}",
        )
    console.print(table)
    if "saved_share" in comparison["about"]:
        console.print(f"  {comparison['about']['saved_share']:.1%} of the tokens saved")


def rounded(value: float) -> str:
    """Without digits that say nothing."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def print_loading(console: Console, result: dict[str, Any]) -> None:
    """Memory and time of loading, for people."""
    title = f"Loading {result['weight_bytes'] / 1e9:.2f} GB of weights in {result['files']} files"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("peak / weights", "with file cache", "seconds", "min to max", "GB/s", "of plain read"):
        table.add_column(heading, justify="right")
    for name, side in result["sides"].items():
        peak, seconds = side.get("peak_of_weights"), side["seconds"]
        table.add_row(
            name,
            f"{peak['max']:.2f}" if peak else "",
            f"{side['peak_with_cache_of_weights']['max']:.2f}" if peak else "",
            f"{seconds['median']:.2f}",
            f"{seconds['min']:.2f} to {seconds['max']:.2f}",
            f"{side['gb_per_s']['median']:.2f}",
            f"{side['of_read']['median']:.0%}" if peak else "",
        )
    console.print(table)
    check = result["check"]
    console.print(
        f"Peak of vecmill's loading: {check['peak']:.2f} times the weights, below {check['allowed_peak']} is required; "
        f"weights {'the same' if check['same'] else 'NOT THE SAME'} as transformers'. Memory by {result['memory']}.",
        soft_wrap=True,
    )


def print_machine(console: Console, device: torch.device, comparisons: Sequence[dict[str, Any]]) -> None:
    """The limits, and whether the machine was quiet."""
    for dtype in dict.fromkeys(comparison["dtype"] for comparison in comparisons):
        own = [comparison["limits"] for comparison in comparisons if comparison["dtype"] == dtype]
        flops, copied = (
            [comparison[key]["median"] for comparison in own] for key in ("matmul_tflops", "copy_gb_per_s")
        )
        console.print(
            f"{describe(device)}: large matmul in {dtype} {min(flops):.4g} to {max(flops):.4g} TFLOP/s, "
            f"copy {min(copied):.4g} to {max(copied):.4g} GB/s read and written",
            soft_wrap=True,
        )
    print_disturbance(console, max(comparison["other_cores"] for comparison in comparisons))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, store; status 1 where sides differ or loading takes more memory than is allowed."""
    options = parse_arguments(arguments)
    machine, sizes = machine_and_sizes(options)
    dtype = options.dtype or ("float32" if options.quick else "auto")
    with torch.inference_mode():
        # map, not a loop: it holds no case, and so no model, while the next is made
        given = cases(Given(sizes, machine.device, dtype), options.only)
        comparisons = list(map(partial(measure, machine=machine), given))
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()  # the processes that load need the memory
    loaded = None if options.only else loading(machine, sizes.load_shape, options.load_gb or sizes.load_gb)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    for comparison in comparisons:
        print_comparison(console, comparison)
    if loaded is not None:
        print_loading(console, loaded)
    print_machine(console, machine.device, comparisons)
    checks = [result["check"] for result in (*comparisons, *([loaded] if loaded is not None else ()))]
    same = all(check["same"] for check in checks)
    settings = {
        "device": describe(machine.device),
        "dtype": dtype,
        "rounds": machine.rounds,
        "seconds": machine.seconds,
        "quick": options.quick,
        "only": options.only,
        "torch_threads": torch.get_num_threads(),
    }
    publish(
        "models",
        {
            "host": describe_host(),
            "settings": settings,
            "comparisons": comparisons,
            "loading": loaded,
            "same_numbers": same,
        },
        store=not options.no_store,
    )
    return 0 if same and all(check.get("peak_allowed", True) for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
