"""What every command line tool has: version, help, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vecmill import __version__
from vecmill.__main__ import cli

COMMANDS = [
    "",
    "serve",
    "models",
    "pull",
    "verify",
    "bench",
    "embed",
    "doctor",
    "status",
    "top",
    "keys",
    "keys new",
    "version",
]


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_long(command: str) -> None:
    short, long = (CliRunner().invoke(cli, [*command.split(), flag]) for flag in ("-h", "--help"))
    assert (short.exit_code, long.exit_code) == (0, 0)
    assert short.stdout == long.stdout
    assert "Usage: " in short.stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        pytest.param("vecmill ben", "bench", marks=pytest.mark.nightly),
        pytest.param("vecmill keys n", "new", marks=pytest.mark.nightly),
        ("vecmill serve --embed-m", "--embed-model"),
    ],
)
def test_the_shell_completes(words: str, completed: str) -> None:
    """As `vecmill --install-completion` has bash ask, without a word on stderr."""
    asked = {"_VECMILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    script = "from vecmill.__main__ import cli; cli(prog_name='vecmill')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.split(), done.stderr) == ([completed], "")
