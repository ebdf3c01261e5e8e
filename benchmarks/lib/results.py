"""Keeps what a benchmark found: the last line on stdout, and a file beside the code."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.host import host_kind

RESULTS = Path(__file__).resolve().parent / "results"


def keep_so_far(name: str, result: Mapping[str, Any]) -> None:
    """Write an unfinished result to the folder that OUT names, if any: a run may be cut off at any second."""
    if not (folder := os.environ.get("OUT")):
        return
    path = Path(folder) / f"{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def publish(name: str, result: dict[str, Any], *, store: bool) -> None:
    """Print the result as one line of JSON and keep it in OUT; `store` writes results/<name>-<date>-<host kind>.json.

    `result` must hold the machine under "host", as describe_host() gives it.
    """
    now = datetime.now(UTC)
    result = {"benchmark": name, "measured_at": now.isoformat(timespec="seconds"), **result}
    if store:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{now:%Y-%m-%d}-{host_kind(result['host'])}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    keep_so_far(name, result)
    print(json.dumps(result), flush=True)
