"""The time that a request spends outside the model: HTTP, tokenization, queue, encoding.

A client sends one request at a time to POST /v1/embeddings: 1, 64 and 2,048 short texts, vectors of the bundled MiniLM
(384 dimensions) and of a random BERT with 4,096, as floats and as base64, with and without gzip. Outside the model is
what the client waited less the answer's `x-inference-time`. During the largest requests a second connection asks GET
/ready every few milliseconds: the longest of these waits is how long the event loop was held, plus what the cores
were taken by the model.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --rounds 3 --wide 1024

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from benchmarks.bundled import bundled_model
from benchmarks.contention import watched
from benchmarks.host import describe_host
from benchmarks.model_rounds import spread
from benchmarks.overhead_rounds import Case, Found, Measured, Plan, described, measure_rounds
from benchmarks.progress import progress
from benchmarks.results import publish
from benchmarks.rounds import judged, print_disturbance, rounded, shown
from benchmarks.servers import free_port, running, vecmill_command
from benchmarks.wide_model import HEAD_DIMENSIONS, write_wide_model
from rich.console import Console
from rich.table import Table

MOST_OUTSIDE_MS = 5.0
TARGET_TEXTS, TARGET_DIMENSIONS = 64, 384
# The layers are not what is measured here: warm-up need not try to compile them.
SERVE = ("--rerank-model", "none", "--torch-compile", "false")
CASES_PER_SIZE = 8  # two models, two encodings, with and without gzip


def measure(wide: int, serve: Sequence[str], plan: Plan) -> tuple[Found, float]:
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
            models = {int(one["dimensions"]): str(one["id"]) for one in listed}
            found = measure_rounds(server.url, models, plan, advance)
        return found, contention.other_cores


def summarise(found: Found) -> dict[str, Any]:
    """What JSON gets."""
    sides = {str(case): _case(case, measured) for case, measured in found.cases.items()}
    ratios = {
        str(case): spread([with_gzip / without for with_gzip, without in _pairs(found, case)])
        for case in found.cases
        if case.gzip
    }
    quiet = {"p99": spread(found.quiet_p99), "longest": spread(found.quiet_longest)}
    return {"cases": sides, "gzip_over_identity": ratios, "others_waited_quiet_ms": quiet}


def _pairs(found: Found, case: Case) -> list[tuple[float, float]]:
    plain = Case(case.model, case.dimensions, case.texts, case.encoding, gzip=False)
    return list(zip(found.cases[case].parts["outside"], found.cases[plain].parts["outside"], strict=True))


def _case(case: Case, measured: Measured) -> dict[str, Any]:
    milliseconds = {name: spread(values) for name, values in measured.parts.items()}
    if (case.texts, case.dimensions, case.encoding) == (TARGET_TEXTS, TARGET_DIMENSIONS, "base64"):
        milliseconds["outside"] = judged(milliseconds["outside"], MOST_OUTSIDE_MS)
    result = {**described(case), "answer_bytes": measured.answer_bytes, "ms": milliseconds}
    if measured.others_longest:
        result["others_waited_ms"] = {"p99": spread(measured.others_p99), "longest": spread(measured.others_longest)}
    return result


def print_summary(found: Mapping[str, Any], other_cores: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    table = Table(title="Outside the model, ms: median over rounds (min to max)", title_justify="left")
    table.add_column("texts x dimensions", no_wrap=True)
    for heading in ("outside", "queue", "tokenization", "rest", "model", "answer MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("gzip / identity", justify="right")
    table.add_column("others waited: p99, longest", justify="right")
    for name, case in found["cases"].items():
        times, waited = case["ms"], case.get("others_waited_ms")
        table.add_row(
            name,
            shown({key: times["outside"][key] for key in ("median", "min", "max")}),
            *(rounded(times[part]["median"]) for part in ("queue", "tokenization", "rest", "inference")),
            f"{case['answer_bytes'] / 1e6:.3g}",
            shown(found["gzip_over_identity"][name]) if case["gzip"] else "",
            f"{rounded(waited['p99']['median'])}, {rounded(waited['longest']['max'])}" if waited else "",
        )
    console.print(table)
    for name, case in found["cases"].items():
        if "target" in case["ms"]["outside"]:
            console.print(f"outside the model, {name}: {shown(case['ms']['outside'], ' ms')}", soft_wrap=True)
    waits = {name: case["others_waited_ms"] for name, case in found["cases"].items() if "others_waited_ms" in case}
    worst = max(waits, key=lambda name: waits[name]["longest"]["max"])
    quiet = found["others_waited_quiet_ms"]
    console.print(
        f"longest that others waited: {rounded(waits[worst]['longest']['max'])} ms (p99 "
        f"{rounded(waits[worst]['p99']['median'])}), during {worst}; with nothing else to do: "
        f"{rounded(quiet['longest']['max'])} ms (p99 {rounded(quiet['p99']['median'])})",
        soft_wrap=True,
    )
    print_disturbance(console, other_cores)


def sizes(value: str) -> list[int]:
    """Of a list with commas."""
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
    plan = Plan(options.rounds, options.repeats, options.large_repeats, options.texts)
    measured, other_cores = measure(options.wide, options.serve, plan)
    found = summarise(measured)
    print_summary(found, other_cores)
    settings = {key: getattr(options, key) for key in ("texts", "wide", "rounds", "repeats", "large_repeats", "serve")}
    publish(
        "overhead",
        {"host": describe_host(), "settings": settings, **found, "other_cores": round(other_cores, 3)},
        store=not options.no_store,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
