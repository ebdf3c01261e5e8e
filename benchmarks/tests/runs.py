"""A benchmark run as a user runs it, in a process of its own and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def run_benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.NAME` with nothing stored."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--no-store", *options],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def json_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line of a run that went well."""
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
