"""Texts per second of vecmill and of the hand-written server it replaces: same weights, same texts.

Each round starts one server, warms it up, sends it functions and classes of Python's standard library over
several connections, and stops it again; the rounds alternate, and no other server runs meanwhile. A pair of rounds
during which other programs used the processor is repeated. For scale, sentence-transformers then gets all texts in one
call, without any server.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --serve --dtype float32   # all after --serve goes to `vecmill serve`
"""

import argparse
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from benchmarks.bundled import MAX_TOKENS, bundled_model
from benchmarks.contention import watched
from benchmarks.host import describe_host
from benchmarks.in_process import BATCH, encode, load_model
from benchmarks.load import embed_all
from benchmarks.progress import progress
from benchmarks.results import publish
from benchmarks.servers import RunningServer, free_port, reference_command, running, vecmill_command
from examples.codebase_search import extract_chunks
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

SEED = 20
CHECKED_TEXTS = 100  # whose vectors must be the same from both servers
MIN_COSINE = 0.999
ALLOWED_OTHER_CORES = 0.1
SERVERS = ("vecmill", "reference")


@dataclass(frozen=True)
class Round:
    """One server's pass over all texts."""

    seconds: float
    sample: npt.NDArray[np.float32]  # (CHECKED_TEXTS, dimensions)
    health: dict[str, Any]
    other_cores: float  # that programs outside the benchmark used meanwhile


def sample_texts(count: int) -> list[str]:
    """`count` functions and classes of the standard library, the same for one Python version."""
    chunks = extract_chunks(Path(sysconfig.get_paths()["stdlib"]))
    return [chunk.source for chunk in random.Random(SEED).sample(chunks, min(count, len(chunks)))]


def count_tokens(model_folder: Path, texts: Sequence[str]) -> int:
    """Tokens that the model sees: special tokens counted, cut at the model's limit, no padding."""
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts)))


def start(server: str, model_folder: Path, serve_options: Sequence[str]) -> AbstractContextManager[RunningServer]:
    """The server of that name on a port of its own."""
    port = free_port()
    if server == "reference":
        return running(reference_command(port, model_folder), port, "/health")
    command = vecmill_command(port, "--embed-model", str(model_folder), *serve_options)
    return running(command, port, "/ready")


def measure(server: RunningServer, texts: Sequence[str], label: str, options: argparse.Namespace) -> Round:
    """One pass over the texts, after a pass over the first of them that does not count."""
    warm_up = texts[: options.warm_up]
    embed_all(server.url, warm_up, connections=options.connections, batch=options.batch)
    health: dict[str, Any] = httpx.get(f"{server.url}/health", timeout=10.0).json()
    with progress(label, len(texts)) as advance, watched(server.pid) as contention:
        answered = embed_all(server.url, texts, connections=options.connections, batch=options.batch, advance=advance)
    return Round(answered.seconds, answered.vectors[:CHECKED_TEXTS], health, contention.other_cores)


def measure_rounds(
    model_folder: Path, texts: Sequence[str], options: argparse.Namespace
) -> tuple[dict[str, list[Round]], int]:
    """Both servers' rounds, and how many pairs of rounds were repeated because other programs were busy meanwhile."""
    rounds: dict[str, list[Round]] = {server: [] for server in SERVERS}
    repeated = 0
    while len(rounds[SERVERS[0]]) < options.rounds:
        pair = {}
        for server in SERVERS:
            with start(server, model_folder, options.serve) as running_server:
                label = f"round {len(rounds[server]) + 1}/{options.rounds}, {server}"
                pair[server] = measure(running_server, texts, label, options)
        if repeated < options.retries and max(one.other_cores for one in pair.values()) > ALLOWED_OTHER_CORES:
            repeated += 1
            continue
        for server, one in pair.items():
            rounds[server].append(one)
    return rounds, repeated


def measure_in_process(model_folder: Path, texts: Sequence[str], rounds: int) -> list[float]:
    """Texts per second of sentence-transformers that gets all texts at once and sorts them by length."""
    model = load_model(model_folder)
    rates = []
    with progress("in process", len(texts) * rounds) as advance:
        encode(model.encode, texts[:BATCH], BATCH, lambda _: None)
        for _ in range(rounds):
            started = time.perf_counter()
            encode(model.encode, texts, len(texts), advance)
            rates.append(len(texts) / (time.perf_counter() - started))
    return rates


def lowest_cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """The lowest cosine between two servers' vectors of the same texts."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((np.sum(one * other, axis=1) / norms).min())


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of the rounds, and the rounds themselves in their order."""
    rounded = [round(value, 3) for value in values]
    return {
        "median": statistics.median(rounded),
        "min": min(rounded),
        "max": max(rounded),
        "rounds": rounded,
    }


def summarise(rounds: dict[str, list[Round]], texts: int, tokens: int) -> dict[str, Any]:
    """Both servers' rates, vecmill's rate over the reference's round by round, and whether they agree."""
    found: dict[str, Any] = {
        server: {
            "texts_per_s": summary([texts / each.seconds for each in rounds[server]]),
            "tokens_per_s": summary([tokens / each.seconds for each in rounds[server]]),
            "other_cores": summary([each.other_cores for each in rounds[server]]),
            "health": {
                key: rounds[server][-1].health.get(key)
                for key in ("version", "model", "dtype", "dtype_reason", "device")
            },
        }
        for server in SERVERS
    }
    pairs = list(zip(rounds["vecmill"], rounds["reference"], strict=True))
    found["ratio"] = summary([theirs.seconds / ours.seconds for ours, theirs in pairs])
    found["min_cosine"] = min(lowest_cosine(ours.sample, theirs.sample) for ours, theirs in pairs)
    return found


def print_summary(found: dict[str, Any], texts: int, tokens: int) -> None:
    """The result for people."""
    table = Table(title=f"{texts:,} texts, {tokens:,} tokens", title_justify="left")
    for heading in ("server", "dtype", "device"):
        table.add_column(heading)
    for heading in ("texts/s", "min to max", "tokens/s"):
        table.add_column(heading, justify="right")
    for server in SERVERS:
        rate, health = found[server]["texts_per_s"], found[server]["health"]
        table.add_row(
            server,
            str(health["dtype"]),
            str(health["device"]),
            f"{rate['median']:.1f}",
            f"{rate['min']:.1f} to {rate['max']:.1f}",
            f"{found[server]['tokens_per_s']['median']:,.0f}",
        )
    ratio = found["ratio"]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"vecmill / reference: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}); "
        f"lowest cosine between their vectors {found['min_cosine']:.6f}",
        soft_wrap=True,
    )
    disturbed = max(found[server]["other_cores"]["max"] for server in SERVERS)
    if disturbed > ALLOWED_OTHER_CORES:
        console.print(f"Other programs used up to {disturbed:.2f} cores meanwhile: measure again on a quiet machine.")
    in_process = found["in_process_texts_per_s"]
    console.print(
        f"sentence-transformers without a server, all texts in one call: {in_process['median']:.1f} texts/s "
        f"({in_process['min']:.1f} to {in_process['max']:.1f})",
        soft_wrap=True,
    )
    console.print(f"vecmill's dtype: {found['vecmill']['health']['dtype_reason']}", soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=200, help="texts before each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="per server (default: %(default)s)")
    parser.add_argument(
        "--retries", type=int, default=5, help="pairs repeated when other programs were busy (default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="texts per request (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled MiniLM)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    return parser.parse_args()


def main() -> int:
    """Measure, print, store; status 1 if the two servers' vectors are not the same."""
    options = parse_arguments()
    model_folder = options.model or bundled_model()
    texts = sample_texts(options.texts)
    tokens = count_tokens(model_folder, texts)
    rounds, repeated = measure_rounds(model_folder, texts, options)
    found = summarise(rounds, len(texts), tokens)
    found["in_process_texts_per_s"] = summary(measure_in_process(model_folder, texts, options.rounds))
    print_summary(found, len(texts), tokens)
    same = found["min_cosine"] >= MIN_COSINE
    settings = {key: getattr(options, key) for key in ("warm_up", "connections", "batch", "serve")}
    about = {"texts": len(texts), "tokens": tokens, "repeated": repeated, **settings}
    publish(
        "throughput",
        {"host": describe_host(), "settings": about, **found, "same_vectors": same},
        store=not options.no_store,
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
