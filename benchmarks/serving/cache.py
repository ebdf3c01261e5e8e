"""What the embedding cache is worth and what it costs, and what a batch takes beside its forward passes.

Hits: texts of the standard library that were all embedded before, from several connections, for 384 dimensions (the
bundled MiniLM) and for a random BERT with 4,096, base64; beside a server that gives back stored bytes of the same size.
Misses: requests of new texts to a server with a cache and to one without, in turns. Store: a million vectors on disk,
64 keys at once. Batch: many lines beside the time of their forward passes, and beside the model's own code in a loop
before and after, which runs larger forward passes and has the cores to itself.

    python -m benchmarks.serving.cache
    python -m benchmarks.serving.cache --entries 10000 --lines 1000 --rounds 2 --seconds 1

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from benchmarks.lib.figures import judged, print_disturbance, shown, spread
from benchmarks.lib.host import describe_host, forget, watched
from benchmarks.lib.minilm import sample_texts
from benchmarks.lib.results import progress, publish
from benchmarks.serving.cache_batch import Loop, measure_batch
from benchmarks.serving.cache_hits import ECHO, CachePlan, measure_hits, measure_misses
from benchmarks.serving.wide_model import HEAD_DIMENSIONS
from rich.console import Console

from vecmill.cache.embedding_cache import KEY_BYTES
from vecmill.cache.vector_format import decode_values, encode_vectors
from vecmill.storage.sqlite_vectors import SqliteVectors

AT_A_TIME = 500  # as many as a busy GPU gives between two writes
KEYS = 64
LOOK_UPS = 200
SEED = 0
ROOM = 2**40
NARROW = 384
LEAST_HITS = {NARROW: 20_000.0, 4096: 5_000.0}  # texts per second
MOST_MISS_PERCENT = 2.0
MOST_LOOK_UP_MS = 5.0
MOST_OVERHEAD_PERCENT = 5.0
Part = Callable[[Path, argparse.Namespace], dict[str, Any]]


def measure_store(folder: Path, entries: int, dimensions: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """Fill the store as the server does, then look up keys drawn at random, cold and warm."""
    path = folder / "cache.db"
    store = SqliteVectors(path, ROOM)
    generator = np.random.default_rng(SEED)
    started = time.perf_counter()
    for start in range(0, entries, AT_A_TIME):
        vectors = generator.standard_normal((AT_A_TIME, dimensions), np.float32)
        keys = [key(number) for number in range(start, start + AT_A_TIME)]
        store.put(dict(zip(keys, encode_vectors(vectors, dimensions), strict=True)), ())
        advance(AT_A_TIME)
    filled = time.perf_counter() - started
    store.close()  # which writes SQLite's log back into the file
    size = path.stat().st_size
    forget(path)  # the first look-ups read the disk
    store = SqliteVectors(path, ROOM)
    store.get([key(0)])
    cold = _look_ups(store, entries, dimensions)
    warm = _look_ups(store, entries, dimensions)
    store.close()
    return {
        "entries": entries,
        "dimensions": dimensions,
        "entries_per_second": entries / filled,
        "bytes_per_entry": size / entries,
        "value_bytes": len(encode_vectors(np.ones((1, dimensions), np.float32), dimensions)[0]),
        "look_up_ms": {"cold": cold, "warm": warm},
    }


def key(number: int) -> bytes:
    """A key whose bytes are as evenly distributed as a real one's."""
    return blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()


def _look_ups(store: SqliteVectors, entries: int, dimensions: int) -> dict[str, Any]:
    """Milliseconds of `KEYS` keys at once, decoded."""
    draw = random.Random(SEED)
    taken = []
    for _ in range(LOOK_UPS):
        keys = [key(number) for number in draw.sample(range(entries), KEYS)]
        started = time.perf_counter()
        vectors = decode_values(store.get(keys), dimensions)
        taken.append(1000 * (time.perf_counter() - started))
        if len(vectors) != KEYS:
            raise RuntimeError(f"{KEYS - len(vectors)} of {KEYS} keys are missing")
    p50, p99 = (float(value) for value in np.percentile(taken, (50, 99)))
    return {"p50": p50, "p99": p99, "max": max(taken)}


def hits(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Texts per second, and their share of what the sockets and the client can do."""
    with progress("hits", 4 * options.rounds) as advance:
        rates = measure_hits(folder, sample_texts(options.texts), _plan(options), options.serve, advance)
    widths = [name for name in rates if not name.endswith(ECHO)]
    return {width: _hits_of(int(width), rates[width], rates[f"{width}, {ECHO}"]) for width in widths}


def _hits_of(width: int, ours: Sequence[float], echoed: Sequence[float]) -> dict[str, Any]:
    figure = spread(ours)
    if width in LEAST_HITS:
        figure |= {"target": LEAST_HITS[width], "met": figure["median"] >= LEAST_HITS[width]}
    shares = [100 * our_rate / echo_rate for our_rate, echo_rate in zip(ours, echoed, strict=True)]
    return {"texts_per_second": figure, "percent_of_echo": spread(shares)}


def misses(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds with and without the cache, and the difference in percent."""
    with progress("misses", options.miss_rounds + 1) as advance:
        plan = _plan(options, options.miss_rounds)
        times = measure_misses(folder, sample_texts(options.texts), plan, options.serve, advance)
    return {size: _misses_of(kinds) for size, kinds in times.items()}


def _misses_of(kinds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "ms": {kind: spread(kinds[kind]) for kind in ("with", "without")},
        "paid_percent": judged(spread(kinds["paid"]), MOST_MISS_PERCENT),
    }


def store(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Look-ups in a full store."""
    with progress("entries", options.entries) as advance:
        result = measure_store(folder, options.entries, NARROW, advance)
    slowest = result["look_up_ms"]["cold"]["p99"]
    return {**result, "target_ms": MOST_LOOK_UP_MS, "met": slowest <= MOST_LOOK_UP_MS}


def batch(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A batch of many lines."""
    with progress("lines", options.lines) as advance:
        texts = sample_texts(options.texts)
        result = measure_batch(
            folder, texts, options.lines, Loop(options.loop_texts, options.limit_seconds), options.serve, advance
        )
    return {**result, "overhead_percent": judged(result["overhead_percent"], MOST_OVERHEAD_PERCENT)}


PARTS: dict[str, Part] = {"hits": hits, "misses": misses, "store": store, "batch": batch}


def _plan(options: argparse.Namespace, rounds: int | None = None) -> CachePlan:
    return CachePlan(rounds or options.rounds, options.seconds, options.connections, options.batch, options.wide)


def print_summary(results: dict[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for width, figures in results.get("hits", {}).items():
        rate, share = figures["texts_per_second"], shown(figures["percent_of_echo"], " %")
        target = (
            f", target at least {rate['target']:,.0f}: {'met' if rate['met'] else 'MISSED'}" if "met" in rate else ""
        )
        low, middle, high = (f"{rate[key]:,.0f}" for key in ("min", "median", "max"))
        console.print(f"hits, {width} dimensions: {middle} texts/s ({low} to {high}){target}; {share} of stored bytes")
    for size, figures in results.get("misses", {}).items():
        times = ", ".join(f"{kind} {shown(ms, ' ms')}" for kind, ms in figures["ms"].items())
        console.print(f"a new {size}: {times}; the cache takes {shown(figures['paid_percent'], ' %')}", soft_wrap=True)
    if figures := results.get("store"):
        times = "; ".join(
            f"{kind} p50 {ms['p50']:.2f} ms, p99 {ms['p99']:.2f}" for kind, ms in figures["look_up_ms"].items()
        )
        console.print(
            f"{figures['entries']:,} entries: {KEYS} keys {times}, target at most {figures['target_ms']:g} ms: "
            f"{'met' if figures['met'] else 'MISSED'}; {figures['bytes_per_entry']:,.0f} bytes on disk each "
            f"({figures['value_bytes']} of them the vector), {figures['entries_per_second']:,.0f} written a second",
            soft_wrap=True,
        )
    if figures := results.get("batch"):
        longer, share = shown(figures["overhead_percent"], " %"), shown(figures["percent_of_loop"], " %")
        console.print(
            f"a batch of {figures['lines']:,} lines: {figures['texts_per_second']:.1f} texts/s, longer than its "
            f"forward passes by {longer}; {share} of the model's code in a loop",
            soft_wrap=True,
        )
    print_disturbance(console, other_cores)


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of hits (default: %(default)s)")
    parser.add_argument("--miss-rounds", type=int, default=15, help="of misses (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of each side in each round (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="texts per request of hits (default: %(default)s)")
    parser.add_argument("--wide", type=int, default=4096, help="dimensions (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=1_000_000, help="of the store (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=100_000, help="of the batch (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2048, help="different ones (default: %(default)s)")
    parser.add_argument(
        "--loop-texts",
        type=int,
        default=4000,
        help="of the model's loop, before and after the batch (default: %(default)s)",
    )
    parser.add_argument("--limit-seconds", type=float, default=1, help="of the matmul beside it (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where files are written (default: the system's temporary folder)")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    if options.wide % HEAD_DIMENSIONS:
        parser.error(f"--wide must be a multiple of {HEAD_DIMENSIONS}")
    results: dict[str, Any] = {}
    with watched() as contention:
        for name in options.parts:
            with TemporaryDirectory(dir=options.folder) as folder:
                results[name] = PARTS[name](Path(folder), options)
    print_summary(results, contention.other_cores)
    settings = {key: value for key, value in vars(options).items() if key not in ("no_store", "folder")}
    result = {"host": describe_host(), "settings": settings, "other_cores": contention.other_cores, **results}
    publish("cache", result, store=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
