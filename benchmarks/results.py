"""Keeps what a benchmark found: the last line on stdout, and a file beside the code."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.host import host_kind

RESULTS = Path(__file__).resolve().parent / "results"


def publish(name: str, result: dict[str, Any], *, store: bool) -> None:
    """Print the result as one line of JSON; `store` also writes results/<name>-<date>-<host kind>.json.

    `result` must hold the machine under "host", as describe_host() gives it.
    """
    now = datetime.now(UTC)
    result = {"benchmark": name, "measured_at": now.isoformat(timespec="seconds"), **result}
    if store:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{now:%Y-%m-%d}-{host_kind(result['host'])}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
