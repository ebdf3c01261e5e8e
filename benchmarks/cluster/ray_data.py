"""A corpus through Ray Data against the same through `vecmill embed` over HTTP: the same texts, passes and output.

Forward passes sleep as stated, so that what is compared is everything else: reading, tokenizing, batching, the wire or
Ray, and writing. Each side has one worker, and starts in the time that is told apart.

    python -m benchmarks.cluster.ray_data --rows 20000
    python -m benchmarks.cluster.ray_data --rows 1000000 --sides ray --words 6
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
from benchmarks.cluster.simulated_server import PASS, in_workers_of_ray
from benchmarks.lib.figures import print_disturbance
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.results import publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from rich.console import Console

from vecmill.cluster.corpus import CorpusOptions
from vecmill.cluster.data import ShardEmbedder, Workers, run_corpus

FIXED_MS, US_PER_TOKEN = 1.4, 2.3  # of a pass: Qwen3-Embedding-0.6B on an H100, docs/gpu.md
SETTINGS: Mapping[str, object] = {"torch_compile": "false", "dtype": "float32", "max_batch_tokens": 4096}
WORDS = ("index", "parse", "a", "the", "return", "value", "of", "list", "and", "open", "file", "with", "name", "for")


class SimulatedShardEmbedder(ShardEmbedder):
    """A worker whose forward passes sleep."""

    def __init__(self, output: str, settings: Mapping[str, object]) -> None:
        in_workers_of_ray()
        super().__init__(output, settings)


def write_rows(path: Path, rows: int, words: int) -> None:
    """Different texts of so many words."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for first in range(0, rows, 10_000):
            count = min(10_000, rows - first)
            chosen = random.integers(0, len(WORDS), (count, words))
            for number, row in enumerate(chosen, first):
                text = f"{number} {' '.join(WORDS[word] for word in row)}"
                file.write(orjson.dumps({"id": number, "text": text}) + b"\n")


def over_http(source: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`vecmill embed` and one server."""
    port = free_port()
    flags = [part for name, value in SETTINGS.items() for part in _flag(name, value)]
    command = vecmill_command(port, *flags)
    fit = [str(options.fixed_ms), str(options.us_per_token)]
    command = [
        sys.executable,
        "-m",
        "benchmarks.cluster.simulated_server",
        *fit,
        *command[command.index("serve") + 1 :],
    ]
    began = time.perf_counter()
    with running(command, port, "/ready") as server:
        started = time.perf_counter()
        embed = [sys.executable, "-m", "vecmill", "embed", str(source), "-o", str(folder / "http.parquet")]
        subprocess.run([*embed, "--url", server.url], check=True, stdout=subprocess.DEVNULL)
        ended = time.perf_counter()
    return {"start_s": started - began, "seconds": ended - started, "texts_per_s": options.rows / (ended - started)}


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def by_ray(source: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`vecmill.cluster.data` with one worker: the time of its shards, and that of Ray's and the model's start."""
    os.environ[PASS] = f"{options.fixed_ms},{options.us_per_token}"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    corpus = CorpusOptions((str(source),), shard_rows=options.shard_rows)
    output = folder / "ray"
    began, at = time.time(), time.perf_counter()
    run_corpus(str(output), corpus, Workers(1, 0, 1.0, SETTINGS, SimulatedShardEmbedder))
    seconds = time.perf_counter() - at
    parts = sorted(output.glob("part-*"), key=lambda path: path.stat().st_mtime)
    table = pq.read_table(output, columns=["id"])
    ids = np.sort(table.column("id").to_numpy())
    assert (ids == np.arange(options.rows)).all(), "each row exactly once"
    first, last = parts[0].stat().st_mtime - began, parts[-1].stat().st_mtime - began
    # From the first shard's end to the last one's: what comes before holds the start.
    rows = options.rows - pq.read_metadata(parts[0]).num_rows
    steady = rows / (last - first) if len(parts) > 1 and last > first else None
    return {"seconds": seconds, "texts_per_s": steady, "start_s": seconds - options.rows / steady if steady else None}


def same_vectors(folder: Path) -> bool:
    """Whether both sides wrote the same."""
    columns = ["id", "embedding"]
    http = pq.read_table(folder / "http.parquet", columns=columns).sort_by("id")
    ray = pq.read_table(folder / "ray", columns=columns).sort_by("id")
    return bool(http.equals(ray))


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--words", type=int, default=60, help="of a text (default: %(default)s)")
    parser.add_argument("--shard-rows", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--sides", default="http,ray", help="default: %(default)s")
    parser.add_argument("--fixed-ms", type=float, default=FIXED_MS, help="of a pass (default: %(default)s)")
    parser.add_argument("--us-per-token", type=float, default=US_PER_TOKEN, help="default: %(default)s")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args()
    sides = {"http": over_http, "ray": by_ray}
    with tempfile.TemporaryDirectory() as name, watched() as contention:
        folder = Path(name)
        source = folder / "texts.jsonl"
        write_rows(source, options.rows, options.words)
        found: dict[str, Any] = {side: sides[side](source, folder, options) for side in options.sides.split(",")}
        if len(found) == 2:
            found["same_vectors"] = same_vectors(folder)
            found["ray_over_http"] = found["ray"]["texts_per_s"] / found["http"]["texts_per_s"]
    console = Console(highlight=False, width=160)
    for side in options.sides.split(","):
        figures = {key: round(value, 1) for key, value in found[side].items() if value is not None}
        console.print(f"{side}: {figures}", soft_wrap=True)
    print_disturbance(console, contention.other_cores)
    settings = {key: value for key, value in vars(options).items() if key != "no_store"}
    result = {"host": describe_host(), "settings": settings, **found, "other_cores": round(contention.other_cores, 3)}
    publish("ray_data", result, store=not options.no_store)
    return 0


if __name__ == "__main__":
    # Ray's workers import the worker's class by the module's name.
    from benchmarks.cluster import ray_data

    sys.exit(ray_data.main())
