"""What a benchmark shows and keeps: progress on stderr, the last line on stdout, and a file beside the code."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.lib.code_digests import code_digests
from benchmarks.lib.host import host_kind
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RESULTS = Path(__file__).resolve().parents[1] / "results"


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` texts. The block gets a function to call with the number of texts just finished."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def keep_so_far(name: str, result: Mapping[str, Any]) -> None:
    """Write an unfinished result to the folder that OUT names, if any: a run may be cut off at any second."""
    if not (folder := os.environ.get("OUT")):
        return
    path = Path(folder) / f"{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def publish(name: str, result: dict[str, Any], *, store: bool, also: Iterable[str] = ()) -> None:
    """Print the result as one line of JSON and keep it in OUT; `store` writes results/<name>-<date>-<host kind>.json.

    `result` must hold the machine under "host", as describe_host() gives it. The file also has the digests of the code
    under "code", and of the files that `also` names.
    """
    now = datetime.now(UTC)
    result = {"benchmark": name, "measured_at": now.isoformat(timespec="seconds"), **result}
    if store:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{now:%Y-%m-%d}-{host_kind(result['host'])}.json"
        path.write_text(json.dumps({**result, "code": code_digests(also=also)}, indent=2) + "\n")
    keep_so_far(name, result)
    print(json.dumps(result), flush=True)
