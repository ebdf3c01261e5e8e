"""How far the server's memory rises while it answers its largest request: 2,048 texts with 4,096 dimensions.

A random BERT of that width is served. Before each request the system's mark of the process's highest resident set is
set back; after it the mark says how far memory rose, in megabytes and in sizes of the result (a float32 for each text
and dimension). Each encoding is asked for by a client that reads at once and by one that does not read until the answer
has waited for it: what a server holds then is all that it holds at one time. The encodings take turns. Linux only.

    python -m benchmarks.serving.answer_memory
    python -m benchmarks.serving.answer_memory --texts 512 --wide 1024 --rounds 2

Ends with status 0 though a target is missed: that is only told.
"""

import argparse
import http.client
import json
import re
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from benchmarks.lib.figures import in_turns, judged, rounded, shown, spread
from benchmarks.lib.host import describe_host
from benchmarks.lib.minilm import bundled_model
from benchmarks.lib.results import progress, publish
from benchmarks.lib.servers import RunningServer, free_port, running, vecmill_command
from benchmarks.serving.wide_model import HEAD_DIMENSIONS, write_wide_model
from rich.console import Console
from rich.table import Table

MOST_RESULTS = 3.0
SERVE = ("--rerank-model", "none", "--torch-compile", "false")
CLEAR_HIGHEST = "5"  # proc(5), clear_refs
UNREAD_SECONDS = 0.5  # after the first bytes are there: time enough to encode a whole answer of 100 MB


@dataclass(frozen=True)
class EncodingCase:
    """One way to ask for the answer."""

    name: str
    fields: dict[str, str]
    gzip: bool = False
    slow: bool = False
    """The client leaves the answer unread for a while."""


CASES = (
    EncodingCase("base64", {"encoding_format": "base64"}),
    EncodingCase("float", {}),
    EncodingCase("float, gzip", {}, gzip=True),
    EncodingCase("base64, slow reader", {"encoding_format": "base64"}, slow=True),
    EncodingCase("float, slow reader", {}, slow=True),
)


def megabytes(pid: int, name: str) -> float:
    """A line of the process's status: VmRSS (resident now), VmHWM (at most since the mark was set back)."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.M)
    assert match is not None
    return int(match[1]) / 1024


def rise(server: RunningServer, case: EncodingCase, texts: Sequence[str]) -> tuple[float, int]:
    """Megabytes above what was resident before, and the bytes of the answer."""
    body = json.dumps({"input": list(texts), **case.fields})
    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip" if case.gzip else "identity"}
    Path(f"/proc/{server.pid}/clear_refs").write_text(CLEAR_HIGHEST)
    before = megabytes(server.pid, "VmRSS")
    connection = http.client.HTTPConnection(str(urlsplit(server.url).netloc), timeout=300)
    try:
        connection.request("POST", "/v1/embeddings", body, headers)
        if case.slow:
            select.select([connection.sock], [], [])
            time.sleep(UNREAD_SECONDS)
        answer = connection.getresponse()
        size = sum(map(len, iter(lambda: answer.read(1_048_576), b"")))
        assert answer.status == 200, answer.status
    finally:
        connection.close()
    # The kernel counts resident pages roughly, so that a small rise may look like none.
    return max(0.0, megabytes(server.pid, "VmHWM") - before), size


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Measure every case once per round, after an uncounted request of each."""
    texts = [f"text {index}" for index in range(options.texts)]
    rises: dict[str, list[float]] = {case.name: [] for case in CASES}
    sizes: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        model = write_wide_model(Path(folder, f"wide-{options.wide}"), options.wide, bundled_model())
        port = free_port()
        command = vecmill_command(port, "--embed-model", str(model), *SERVE, *options.serve)
        with (
            running(command, port, "/ready") as server,
            progress("requests", len(CASES) * (options.rounds + 1)) as advance,
        ):
            for case in CASES:
                rise(server, case, texts)
                advance(1)
            for case in in_turns(CASES, options.rounds):
                risen, sizes[case.name] = rise(server, case, texts)
                rises[case.name].append(risen)
                advance(1)
    return rises, sizes


def print_summary(encodings: dict[str, dict[str, Any]], options: argparse.Namespace, result_mb: float) -> None:
    """The result for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    title = f"{options.texts} x {options.wide}: a result has {rounded(result_mb)} MB; median (min to max)"
    table = Table(title=title, title_justify="left")
    for heading in ("encoding", "memory rises by MB", "in results", "answer MB"):
        table.add_column(heading, justify="left" if heading == "encoding" else "right", no_wrap=True)
    for name, result in encodings.items():
        in_results = {key: result["results"][key] for key in ("median", "min", "max")}
        table.add_row(name, shown(result["mb"]), shown(in_results), rounded(result["answer_bytes"] / 2**20))
    console.print(table)
    worst = max(encodings, key=lambda name: encodings[name]["results"]["median"])
    console.print(f"most: {worst}, {shown(encodings[worst]['results'], ' results')}", soft_wrap=True)


def main() -> int:
    """Measure, print, store; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2048, help="per request (default: %(default)s)")
    parser.add_argument("--wide", type=int, default=4096, help="dimensions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    options = parser.parse_args()
    if options.wide % HEAD_DIMENSIONS:
        parser.error(f"--wide must be a multiple of {HEAD_DIMENSIONS}")
    rises, sizes = measure(options)
    result_mb = options.texts * options.wide * 4 / 2**20
    encodings = {
        name: {
            "answer_bytes": sizes[name],
            "mb": spread(values),
            "results": judged(spread([value / result_mb for value in values]), MOST_RESULTS),
        }
        for name, values in rises.items()
    }
    print_summary(encodings, options, result_mb)
    settings = {key: getattr(options, key) for key in ("texts", "wide", "rounds", "serve")}
    publish(
        "answer_memory",
        {"host": describe_host(), "settings": settings, "result_mb": result_mb, "encodings": encodings},
        store=not options.no_store,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
