"""The command line of a benchmark that compares servers: which of them, and what they are started with."""

import argparse
import shlex
from pathlib import Path

from benchmarks.bundled import bundled_model
from benchmarks.environments import default_folder
from benchmarks.peers import INFINITY_OPTIONS, PEERS, VLLM_OPTIONS, Wanted


def server_names(value: str) -> list[str]:
    """Of a list with commas, in the order in which they are measured."""
    names = value.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"no such server: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return [name for name in PEERS if name in names]


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add them; --serve takes all that follows it, so it is the last on a command line."""
    parser.add_argument("--servers", type=server_names, default=list(PEERS), help=f"default: {','.join(PEERS)}")
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled MiniLM)")
    parser.add_argument(
        "--environments",
        type=Path,
        default=default_folder(),
        help="where Infinity and vLLM are installed (default: VECMILL_BENCHMARK_ENVIRONMENTS, or %(default)s)",
    )
    for name, default in (("infinity", INFINITY_OPTIONS), ("vllm", VLLM_OPTIONS)):
        parser.add_argument(
            f"--{name}", type=shlex.split, default=shlex.split(default), help=f"its options (default: {default})"
        )
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")


def wanted(options: argparse.Namespace) -> Wanted:
    """What the servers are started with."""
    return Wanted(options.model or bundled_model(), options.environments, options.serve, options.infinity, options.vllm)
