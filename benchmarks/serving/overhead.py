"""The time that a request spends outside the model: HTTP, tokenization, queue, encoding.

A client sends one request at a time to POST /v1/embeddings: 1, 64 and 2,048 short texts, vectors of the bundled MiniLM
(384 dimensions) and of a random BERT with 4,096: as floats in JSON, plain, with gzip and with zstd; as base64; as raw
float32 and float16. Outside the model is what the client waited less the answer's `x-inference-time`. During the
largest requests a second connection asks GET /ready every few milliseconds: the longest of these waits is how long the
event loop was held, plus what the cores were taken by the model.

Then the plain answers of floats are compressed in this process, in turns: by ISA-L and by zlib, which takes its place
where there is no wheel, both as gzip, and by zstd, each as the server does it.

    python -m benchmarks.serving.overhead
    python -m benchmarks.serving.overhead --rounds 3 --wide 1024

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import orjson
from benchmarks.lib.figures import in_turns, judged, print_disturbance, rounded, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import bundled_model
from benchmarks.lib.results import progress, publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from benchmarks.lib.timed_http import Timed, TimedConnection, polled
from benchmarks.serving.wide_model import HEAD_DIMENSIONS, write_wide_model
from rich.console import Console
from rich.table import Table

from vecmill.http.compression import GZIP_WINDOW, LEVEL, Coding, gzip_maker

PATH = "/v1/embeddings"
IDENTITY = "identity"
BYTES = "application/octet-stream; dtype="
# How vectors are written, and how the answer is compressed.
WAYS = (
    *(("float", coding) for coding in (IDENTITY, "gzip", "zstd")),
    *(("base64", coding) for coding in (IDENTITY, "gzip")),
    *((dtype, IDENTITY) for dtype in ("float32", "float16")),
)
FLOAT32_IN_BASE64 = 4 / 3 * 4  # characters
QUIET_SECONDS = 1.0
PARTS = {"x-inference-time": "inference", "x-queue-time": "queue", "x-tokenization-time": "tokenization"}
MOST_OUTSIDE_MS = 5.0
TARGET_TEXTS, TARGET_DIMENSIONS = 64, 384  # of the request that MOST_OUTSIDE_MS is for
# The layers are not what is measured here: warm-up need not try to compile them.
SERVE = ("--rerank-model", "none", "--torch-compile", "false")
CASES_PER_SIZE = 2 * len(WAYS)  # two models
ZLIB = "gzip, zlib"
# As vecmill.http.compression makes them.
COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    ZLIB: lambda body: zlib.compress(body, LEVEL, GZIP_WINDOW),
    **({"gzip, ISA-L": Coding.GZIP.compress} if gzip_maker is not zlib else {}),
    "zstd": Coding.ZSTD.compress,
}


@dataclass(frozen=True)
class OverheadCase:
    """One kind of request."""

    model: str
    dimensions: int
    texts: int
    encoding: str
    """`float` and `base64` in JSON; `float32` and `float16` are raw rows."""
    coding: str
    """The Accept-Encoding."""

    def __str__(self) -> str:
        return f"{self.texts} x {self.dimensions} {self.encoding}{'' if self.coding == IDENTITY else f' {self.coding}'}"

    @property
    def is_raw(self) -> bool:
        """Whether rows come without JSON around them."""
        return self.encoding in ("float32", "float16")

    def body(self) -> bytes:
        """Short texts, all different: equal ones are computed once."""
        texts = [f"text {number}" for number in range(self.texts)]
        form = "float" if self.is_raw else self.encoding
        return json.dumps({"model": self.model, "input": texts, "encoding_format": form}).encode()

    def headers(self) -> dict[str, str]:
        """Of the request."""
        return {
            "Content-Type": "application/json",
            "Accept-Encoding": self.coding,
            "Accept": f"{BYTES}{self.encoding}" if self.is_raw else "*/*",
        }


@dataclass
class Measured:
    """The medians of one case in milliseconds, one for each round, by what the time was spent on."""

    parts: dict[str, list[float]] = field(default_factory=dict)
    answer_bytes: int = 0
    others_p99: list[float] = field(default_factory=list)
    others_longest: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class OverheadPlan:
    """How often the cases are measured."""

    rounds: int
    repeats: int
    """Of each case in each round."""
    large_repeats: int
    """The same for the largest number of texts."""
    sizes: Sequence[int]
    """Texts per request."""


@dataclass
class OverheadResults:
    """The measurements by case, and how long others waited while no case was running."""

    cases: dict[OverheadCase, Measured] = field(default_factory=dict)
    compressed: dict[str, Any] = field(default_factory=dict)
    """By plain answer and compressor, as it is stored."""
    quiet_p99: list[float] = field(default_factory=list)
    quiet_longest: list[float] = field(default_factory=list)


def cases(models: dict[int, str], sizes: Sequence[int]) -> list[OverheadCase]:
    """All cases; `models` maps the dimensions of vectors to the model."""
    return [
        OverheadCase(models[dimensions], dimensions, texts, encoding, coding)
        for dimensions, texts, (encoding, coding) in product(sorted(models), sizes, WAYS)
    ]


def measure_rounds(
    url: str, models: dict[int, str], plan: OverheadPlan, advance: Callable[[int], None]
) -> OverheadResults:
    """Measure every case once per round, in order and in reverse by turns; `advance` is called after each."""
    results = OverheadResults({case: Measured() for case in cases(models, plan.sizes)})
    connection = TimedConnection(url)
    for case, measured in results.cases.items():
        answer = connection.send("POST", PATH, case.body(), case.headers())
        measured.answer_bytes = _checked(case, answer)
        if (case.encoding, case.coding) == ("float", IDENTITY):
            results.compressed[str(case)] = compressed_in_turns(answer.content, plan.rounds)
    for _ in range(plan.rounds):
        with polled(url) as polls:
            time.sleep(QUIET_SECONDS)
        _add_waits(polls.milliseconds, results.quiet_p99, results.quiet_longest)
    for case in in_turns(list(results.cases), plan.rounds):
        _round(url, connection, case, results.cases[case], plan, watched=case.texts == max(plan.sizes))
        advance(1)
    connection.close()
    return results


def compressed_in_turns(body: bytes, rounds: int) -> dict[str, Any]:
    """By compressor: milliseconds for `body`, how many times as fast as zlib, and the bytes that come out."""
    milliseconds: dict[str, list[float]] = {name: [] for name in COMPRESSORS}
    sizes: dict[str, int] = {}
    for name in in_turns(list(COMPRESSORS), rounds):
        started = time.perf_counter()
        sizes[name] = len(COMPRESSORS[name](body))
        milliseconds[name].append((time.perf_counter() - started) * 1000)
    return {
        name: {
            "bytes": sizes[name],
            "ms": spread(times),
            "times_zlib": spread([plain / this for plain, this in zip(milliseconds[ZLIB], times, strict=True)]),
        }
        for name, times in milliseconds.items()
    }


def _checked(case: OverheadCase, answer: Timed) -> int:
    """The size of the answer, which must hold what was asked for."""
    if case.is_raw:
        rows_and_values = f"{case.texts},{case.dimensions}"
        size = case.texts * case.dimensions * np.dtype(case.encoding).itemsize
        if (answer.headers["x-embedding-shape"], len(answer.content)) != (rows_and_values, size):
            raise RuntimeError(f"{case}: the answer has {len(answer.content)} bytes")
        return len(answer.content)
    rows = orjson.loads(answer.body())["data"]
    expected = case.dimensions if case.encoding == "float" else round(case.dimensions * FLOAT32_IN_BASE64)
    if len(rows) != case.texts or abs(len(rows[0]["embedding"]) - expected) > 3:
        raise RuntimeError(f"{case}: the answer has {len(rows)} vectors of {len(rows[0]['embedding'])}")
    return len(answer.content)


def _round(
    url: str, connection: TimedConnection, case: OverheadCase, measured: Measured, plan: OverheadPlan, *, watched: bool
) -> None:
    body, headers = case.body(), case.headers()
    samples: list[dict[str, float]] = []
    waits: list[float] = []
    for _ in range(plan.large_repeats if watched else plan.repeats):
        if watched:
            with polled(url) as polls:
                samples.append(_parts(connection.send("POST", PATH, body, headers)))
            waits += polls.milliseconds
        else:
            samples.append(_parts(connection.send("POST", PATH, body, headers)))
    for name in samples[0]:
        measured.parts.setdefault(name, []).append(statistics.median(sample[name] for sample in samples))
    if watched:
        _add_waits(waits, measured.others_p99, measured.others_longest)


def _parts(answer: Timed) -> dict[str, float]:
    """Milliseconds by what they were spent on; `rest` is HTTP, encoding, and the client's own reading."""
    parts = {name: float(answer.headers[header]) for header, name in PARTS.items()}
    outside = answer.milliseconds - parts["inference"]
    rest = outside - parts["queue"] - parts["tokenization"]
    return {"whole": answer.milliseconds, "outside": outside, "rest": rest, **parts}


def _add_waits(milliseconds: Sequence[float], p99: list[float], longest: list[float]) -> None:
    if milliseconds:
        p99.append(float(np.percentile(milliseconds, 99)))
        longest.append(max(milliseconds))


def measure(wide: int, serve: Sequence[str], plan: OverheadPlan) -> tuple[OverheadResults, float]:
    """Both models on one server, so that they are measured in turns; also the cores that other programs used."""
    with TemporaryDirectory() as folder:
        model = write_wide_model(Path(folder, f"wide-{wide}"), wide, bundled_model())
        port = free_port()
        command = vecmill_command(port, "--embed-model", f"{bundled_model()},{model}", *SERVE, *serve)
        with (
            running(command, port, "/ready") as server,
            watched() as contention,
            progress("requests of each kind", plan.rounds * len(plan.sizes) * CASES_PER_SIZE) as advance,
        ):
            listed = httpx.get(f"{server.url}/v1/models", timeout=10.0).json()["data"]
            models = {int(entry["dimensions"]): str(entry["id"]) for entry in listed}
            results = measure_rounds(server.url, models, plan, advance)
        return results, contention.other_cores


def summarise(results: OverheadResults) -> dict[str, Any]:
    """The results as they are stored."""
    sides = {str(case): _case(case, measured) for case, measured in results.cases.items()}
    ratios = {
        str(case): spread([this / plain for this, plain in _pairs(results, case)])
        for case in results.cases
        if (case.encoding, case.coding) != ("float", IDENTITY)
    }
    quiet = {"p99": spread(results.quiet_p99), "longest": spread(results.quiet_longest)}
    return {
        "cases": sides,
        "over_plain_floats": ratios,
        "compressed": results.compressed,
        "others_waited_quiet_ms": quiet,
    }


def _pairs(results: OverheadResults, case: OverheadCase) -> list[tuple[float, float]]:
    plain = OverheadCase(case.model, case.dimensions, case.texts, "float", IDENTITY)
    return list(zip(results.cases[case].parts["outside"], results.cases[plain].parts["outside"], strict=True))


def _case(case: OverheadCase, measured: Measured) -> dict[str, Any]:
    milliseconds = {name: spread(values) for name, values in measured.parts.items()}
    if (case.texts, case.dimensions, case.encoding) == (TARGET_TEXTS, TARGET_DIMENSIONS, "base64"):
        milliseconds["outside"] = judged(milliseconds["outside"], MOST_OUTSIDE_MS)
    result = {
        "texts": case.texts,
        "dimensions": case.dimensions,
        "encoding": case.encoding,
        "coding": case.coding,
        "answer_bytes": measured.answer_bytes,
        "ms": milliseconds,
    }
    if measured.others_longest:
        result["others_waited_ms"] = {"p99": spread(measured.others_p99), "longest": spread(measured.others_longest)}
    return result


def print_summary(summary: Mapping[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    table = Table(title="Outside the model, ms: median over rounds (min to max)", title_justify="left")
    table.add_column("texts x dimensions", no_wrap=True)
    for heading in ("outside", "queue", "tokenization", "rest", "model", "answer MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("/ plain floats", justify="right")
    table.add_column("others waited: p99, longest", justify="right")
    for name, case in summary["cases"].items():
        times, waited = case["ms"], case.get("others_waited_ms")
        table.add_row(
            name,
            shown({key: times["outside"][key] for key in ("median", "min", "max")}),
            *(rounded(times[part]["median"]) for part in ("queue", "tokenization", "rest", "inference")),
            f"{case['answer_bytes'] / 1e6:.3g}",
            shown(summary["over_plain_floats"][name]) if name in summary["over_plain_floats"] else "",
            f"{rounded(waited['p99']['median'])}, {rounded(waited['longest']['max'])}" if waited else "",
        )
    console.print(table)
    console.print(_compressed_table(summary["compressed"]))
    for name, case in summary["cases"].items():
        if "target" in case["ms"]["outside"]:
            console.print(f"outside the model, {name}: {shown(case['ms']['outside'], ' ms')}", soft_wrap=True)
    waits = {name: case["others_waited_ms"] for name, case in summary["cases"].items() if "others_waited_ms" in case}
    worst = max(waits, key=lambda name: waits[name]["longest"]["max"])
    quiet = summary["others_waited_quiet_ms"]
    console.print(
        f"longest that others waited: {rounded(waits[worst]['longest']['max'])} ms (p99 "
        f"{rounded(waits[worst]['p99']['median'])}), during {worst}; with nothing else to do: "
        f"{rounded(quiet['longest']['max'])} ms (p99 {rounded(quiet['p99']['median'])})",
        soft_wrap=True,
    )
    print_disturbance(console, other_cores)


def _compressed_table(compressed: Mapping[str, Any]) -> Table:
    table = Table(title="Compressing plain answers, ms: median over rounds (min to max)", title_justify="left")
    for heading in ("answer", "by", "ms", "times as fast as zlib", "MB"):
        table.add_column(heading, justify="left" if heading in ("answer", "by") else "right", no_wrap=True)
    for name, by in compressed.items():
        for compressor, found in by.items():
            size = f"{found['bytes'] / 1e6:.3g}"
            table.add_row(name, compressor, shown(found["ms"]), shown(found["times_zlib"]), size)
    return table


def sizes(value: str) -> list[int]:
    """The sizes in a comma-separated list."""
    return [int(number) for number in value.split(",")]


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=sizes, default=[1, 64, 2048], help="per request (default: 1,64,2048)")
    parser.add_argument("--wide", type=int, default=4096, help="dimensions of the wide model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="of each case in a round (default: %(default)s)")
    parser.add_argument(
        "--large-repeats", type=int, default=2, help="of those with the most texts (default: %(default)s)"
    )
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    if options.wide % HEAD_DIMENSIONS or options.wide == TARGET_DIMENSIONS:
        parser.error(f"--wide must be a multiple of {HEAD_DIMENSIONS} and not {TARGET_DIMENSIONS}")
    plan = OverheadPlan(options.rounds, options.repeats, options.large_repeats, options.texts)
    measured, other_cores = measure(options.wide, options.serve, plan)
    summary = summarise(measured)
    print_summary(summary, other_cores)
    settings = {key: getattr(options, key) for key in ("texts", "wide", "rounds", "repeats", "large_repeats", "serve")}
    publish(
        "overhead",
        {"host": describe_host(), "settings": settings, **summary, "other_cores": round(other_cores, 3)},
        store=not options.no_store,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
