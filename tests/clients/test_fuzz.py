"""Schemathesis sends what the API's document allows, and what it does not, to a real server: `make fuzz`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.servers import free_port, running, vecmill_command

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).parent / "environments" / "schemathesis" / "schemathesis.toml"
SCHEMATHESIS = ROOT / ".clients" / "schemathesis" / "bin" / "schemathesis"
SERVER = ("--device", "cpu", "--dtype", "float32", "--torch-compile", "false")
KEY = "schemathesis-has-this-key"
WITH_KEY = ("--header", f"Authorization: Bearer {KEY}")

BOUNDED = ("--max-examples", "20", "--request-timeout", "30", "--suppress-health-check", "all")
SAME_EVERY_TIME = ("--seed", "1", "--generation-database", "none")
# Answers without an end, and what takes a processor for half a minute.
ENDLESS = tuple(
    word for path in ("/jobs/events", "/dashboard/events", "/dashboard/doctor") for word in ("--exclude-path", path)
)

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("api_key", "options", "seconds"),
    [
        pytest.param("", (), 140, id="no keys"),
        pytest.param(f"fuzz:{KEY}", WITH_KEY, 100, id="with a key"),
        pytest.param(f"fuzz:{KEY}", (), 60, id="without the key"),
    ],
)
def test_every_answer_is_as_documented(api_key: str, options: tuple[str, ...], seconds: int, tmp_path: Path) -> None:
    """What it finds is this test's output: each with the curl that repeats it."""
    port = free_port()
    with running(vecmill_command(port, *SERVER), port, "/ready", {"API_KEY": api_key}) as server:
        finished = subprocess.run(
            [
                *(str(SCHEMATHESIS), "--config-file", str(SETTINGS)),
                *("run", str(ROOT / "docs" / "openapi.json"), "--url", server.url),
                *(*BOUNDED, *SAME_EVERY_TIME, *ENDLESS, *options, "--max-time", str(seconds), "--no-color"),
            ],
            cwd=tmp_path,  # it writes down what failed
            check=False,
        )
        assert finished.returncode == 0
        assert httpx.get(f"{server.url}/ready").status_code == 200
