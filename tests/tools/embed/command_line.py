"""`vecmill embed` as it is typed."""

from __future__ import annotations

from pathlib import Path

import orjson
from typer.testing import CliRunner, Result

from vecmill.__main__ import cli


def embed(*arguments: object, stdin: bytes | None = None) -> Result:
    """Run it; the key in the environment is always the same."""
    return CliRunner().invoke(cli, ["embed", *map(str, arguments)], input=stdin, env={"API_KEY": "from-outside"})


def embedded(*arguments: object, stdin: bytes | None = None) -> Result:
    """Run it: every text gets its vector."""
    result = embed(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def write_jsonl(path: Path, *rows: object) -> Path:
    """A row on each line."""
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path
