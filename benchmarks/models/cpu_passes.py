"""What makes forward passes on a CPU fast, each step by itself: the same texts, in turns, in one run.

Ways to run a model's bfloat16 weights: each batch as one pass in all threads (`plain`); as passes at the same time
(`parts`); with weights that are laid out once (`prepacked`); with the attention that the server chooses on this machine
(`attention`, torch's kernel in the ways before); and all of these, as the server does. Batches are in the order of
arrival; texts are cut at the model's limit. Each way is run with malloc's own settings and with the server's, in
processes of their own. Beside texts a second stand the share of a large matmul's rate and the milliseconds of a search
alone.

    python -m benchmarks.models.cpu_passes                                    # the bundled model
    python -m benchmarks.models.cpu_passes --models ModernBERT-base --texts 100   # random values in a hub model's shape
    python -m benchmarks.models.cpu_passes --instructions AVX512_CORE_BF16        # as on a processor without AMX
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import benchmarks.lib.threads  # noqa: F401  # before torch
import torch
from benchmarks.lib.figures import in_turns, print_disturbance, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import bundled_model, sample_texts
from benchmarks.lib.minilm import tokenize as tokenize_as_bundled
from benchmarks.lib.results import keep_so_far, publish
from benchmarks.models.families import FAMILY_SHAPES, QUERY, tokenize, write_family
from benchmarks.models.workloads import batches, operations
from benchmarks.serving.packed_loop import matmul_rate, run
from rich.console import Console
from rich.table import Table

from vecmill.core.types import Row, Task
from vecmill.engine.forward import CpuThreads, Device, LoadedModel
from vecmill.engine.warmup import CPU_BATCH_TOKENS
from vecmill.models.checkpoint import Source, read
from vecmill.models.networks import load_model
from vecmill.models.packed_attention import attention_on
from vecmill.models.prepacked_linears import prepack
from vecmill.models.weights import Target

BUNDLED = "MiniLM"
# oneDNN's variable, and its names of instruction sets: none above the one that is named is used.
INSTRUCTIONS = "ONEDNN_MAX_CPU_ISA"
INSTRUCTION_SETS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16")
MALLOC = {"as the system has it": {"GLIBC_TUNABLES": ""}, "as the server sets it": {}}
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
# Passes of up to so many tokens get one thread, as a server's measuring finds on most machines.
SINGLE_UP_TO = 256
SEARCH_TOKENS, SEARCHES = 16, 40


@contextmanager
def folder_of(name: str) -> Iterator[tuple[Path, Task]]:
    """A model's folder while the block runs."""
    if name == BUNDLED:
        yield bundled_model(), Task.EMBED
        return
    with TemporaryDirectory() as made:
        folder = Path(made) / "model"
        write_family(folder, FAMILY_SHAPES[name], DTYPE)
        yield folder, FAMILY_SHAPES[name].task


def loaded(folder: Path, task: Task, *, laid_out: bool) -> tuple[LoadedModel, LoadedModel]:
    """A model with torch's attention, and with that of the server; its linear layers prepacked or not."""
    checkpoint = read(Source(folder.name, folder, task))
    network = load_model(checkpoint, Target(DTYPE, CPU))
    if laid_out:
        prepack(network)
    threads = CpuThreads()
    threads.single_up_to = SINGLE_UP_TO
    none = cast(Any, None)  # no card and no tokenizer are needed
    torchs, servers = (
        LoadedModel(none, checkpoint, network, none, attention_on(CPU, DTYPE, timed=timed), threads=threads)
        for timed in (False, True)
    )
    return torchs, servers


def rows_of(name: str, folder: Path, task: Task, texts: int) -> list[Row]:
    """The texts' tokens; of a reranker with a query before each."""
    if name == BUNDLED:
        return [Row(row) for row in tokenize_as_bundled(folder, sample_texts(texts))]
    return [Row(row) for row in tokenize(sample_texts(texts), QUERY if task is Task.RERANK else None)]


def measure(name: str, texts: int, rounds: int) -> dict[str, Any]:
    """All ways in this process."""
    with folder_of(name) as (folder, task):
        plain, with_attention = loaded(folder, task, laid_out=False)
        prepacked, with_all = loaded(folder, task, laid_out=True)
        rows = rows_of(name, folder, task, texts)
    threads = torch.get_num_threads()
    undivided, divided = Device(CPU, None), Device.of(CPU, threads)
    packs = batches(rows, CPU_BATCH_TOKENS)
    searches = [[Row(row.token_ids[:SEARCH_TOKENS])] for row in rows[:SEARCHES]]
    ways = {
        "plain": (plain, undivided),
        "parts": (plain, divided),
        "prepacked": (prepacked, undivided),
        "attention": (with_attention, undivided),
        "all": (with_all, divided),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    milliseconds: dict[str, list[float]] = {way: [] for way in ways}
    for model, device in ways.values():  # kernels and memory are prepared
        run(model, packs[: max(1, len(packs) // 4)], device)
    rates = [_limit(threads)]
    for way in in_turns(list(ways), rounds):
        model, device = ways[way]
        seconds[way].append(_seconds(model, packs, device))
        milliseconds[way].append(1000 * statistics.median(_seconds(model, [each], device) for each in searches))
        rates.append(_limit(threads))
    shape = FAMILY_SHAPES[name].shape if name in FAMILY_SHAPES else plain.checkpoint.config
    done = operations(plain.checkpoint.family.model_type, plain.model, shape, packs)
    rate = statistics.median(rates)
    return {
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "attention": with_all.attention.value,
        "matmul_tflops": spread([each / 1e12 for each in rates]),
        "ways": {
            way: {
                "texts_per_s": spread([len(rows) / each for each in seconds[way]]),
                "of_limit": spread([done / each / rate for each in seconds[way]]),
                "over_plain": spread([one / each for one, each in zip(seconds["plain"], seconds[way], strict=True)]),
                "search_ms": spread(milliseconds[way]),
            }
            for way in ways
        },
    }


def _limit(threads: int) -> float:
    torch.set_num_threads(threads)
    return matmul_rate(CPU, DTYPE, 0.3)


@torch.inference_mode()
def _seconds(model: LoadedModel, packs: Sequence[Sequence[Row]], device: Device) -> float:
    started = perf_counter()
    run(model, packs, device)
    return perf_counter() - started


def in_a_child(name: str, variables: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process with these variables."""
    given = ("--texts", str(options.texts), "--rounds", str(options.rounds), "--child", name)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.models.cpu_passes", *given],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(name: str, found: dict[str, Any]) -> None:
    """One model's figures for people."""
    table = Table(title=name, title_justify="left")
    for heading in ("malloc", "way", "texts/s", "of the matmul rate", "over plain", "a search, ms"):
        table.add_column(heading)
    for malloc, result in found.items():
        for way, figures in result["ways"].items():
            table.add_row(
                malloc, way, *(shown(figures[key]) for key in ("texts_per_s", "of_limit", "over_plain", "search_ms"))
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=[BUNDLED], choices=(BUNDLED, *FAMILY_SHAPES), help="default: %(default)s"
    )
    parser.add_argument("--texts", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--instructions", choices=INSTRUCTION_SETS, help="the most that oneDNN may use; default: all of the processor's"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args(arguments)
    if options.child is not None:
        # In a thread, as the server: only the main one has the heap that the system may extend in one piece.
        with ThreadPoolExecutor(1) as thread:
            print(json.dumps(thread.submit(measure, options.child, options.texts, options.rounds).result()))
        return
    found: dict[str, dict[str, Any]] = {}
    allowed = {} if options.instructions is None else {INSTRUCTIONS: options.instructions}
    with watched() as contention:
        for name in options.models:
            found[name] = {how: in_a_child(name, variables | allowed, options) for how, variables in MALLOC.items()}
            print_table(name, found[name])
            keep_so_far("cpu_passes", found)
    print_disturbance(Console(), contention.other_cores)
    result = {
        "host": describe_host(),
        "settings": {key: getattr(options, key) for key in ("texts", "rounds", "instructions")},
        "other_cores": contention.other_cores,
        "models": found,
    }
    # Other models' figures do not take the place of the bundled one's, nor those with fewer instructions.
    others = [name for name in options.models if name != BUNDLED]
    which = others if len(others) < 2 else ["families"]
    fewer = [options.instructions.lower()] if options.instructions else []
    publish("_".join(["cpu_passes", *which, *fewer]), result, store=not options.no_store)


if __name__ == "__main__":
    main()
