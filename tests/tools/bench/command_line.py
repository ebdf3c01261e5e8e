"""`vecmill bench` as it is typed."""

from __future__ import annotations

from typing import Any

import orjson
from typer.testing import CliRunner, Result

from vecmill.__main__ import cli


def bench(*arguments: object) -> Result:
    """Run it without a warm-up beyond the first, checked request."""
    return CliRunner().invoke(cli, ["bench", "--warm-up", "0", *map(str, arguments)], env={"API_KEY": "from-outside"})


def bench_json(*arguments: object) -> dict[str, Any]:
    """Run it with --json: the object, of a run without errors."""
    result = bench("--json", *arguments)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = orjson.loads(result.stdout)
    return report
