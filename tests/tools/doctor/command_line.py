"""`vecmill doctor` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from typer.testing import CliRunner, Result

from vecmill.__main__ import cli

COMMAND = (sys.executable, "-m", "vecmill", "doctor")
Check = dict[str, Any]


def doctor(*options: str, **environment: str) -> Result:
    """Run it in this process."""
    return CliRunner().invoke(cli, ["doctor", *options], env={"COLUMNS": "200", **environment})


def checks(*names: str, **environment: str) -> dict[str, Check]:
    """What some checks found, by name; the exit code says the same."""
    result = doctor("--json", "--only", ",".join(names), **environment)
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["ok"] is all(check["status"] != "fail" for check in report["checks"]), report
    assert result.exit_code == (0 if report["ok"] else 1), result.output
    assert [check["name"] for check in report["checks"]] == list(names)
    return {check["name"]: check for check in report["checks"]}


def check(name: str, **environment: str) -> Check:
    """What one check found."""
    return checks(name, **environment)[name]


def doctor_process(
    *options: str, within: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own; `within` is a command that runs the one that follows it."""
    return subprocess.run(
        [*within, *COMMAND, *options],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=90,
    )
