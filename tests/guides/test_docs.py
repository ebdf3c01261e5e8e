"""The front door, the help and the list of dependencies say the same as the code.

What is written from the code whole (settings, calls) is compared in tests/http/test_openapi.py.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

from typer.testing import CliRunner

from vecmill.__main__ import cli
from vecmill.config.settings import GROUPS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DEPENDENCIES = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
LARGEST_README = 9_000  # bytes: a page that is read before the first start
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_readme_is_one_page() -> None:
    assert len(README.encode()) <= LARGEST_README


def test_the_architecture_page_has_every_room_and_names_files_that_there_are() -> None:
    package, page = ROOT / "src" / "vecmill", (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    listed = {name for row in re.findall(r"^\| (`.+?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert rooms - listed == {"__init__"}
    for name in re.findall(r"`([\w/]+\.py)`", page):
        assert list(package.rglob(name)), name


def test_a_class_name_means_one_thing() -> None:
    trees = (ast.parse(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py"))
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_setting_is_a_flag_in_the_help() -> None:
    result = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for group in GROUPS:
        assert group.title in result.output
        for name in group.model_fields:
            assert f"--{name.replace('_', '-')}" in result.output
            assert name.upper() in result.output


def test_every_dependency_is_listed_with_its_reason() -> None:
    project = PYPROJECT["project"]
    lists = [*project["optional-dependencies"].values(), *PYPROJECT["dependency-groups"].values()]
    wanted = [
        *project["dependencies"],
        *(requirement for group in lists for requirement in group if isinstance(requirement, str)),
    ]
    for requirement in [*wanted, *PYPROJECT["build-system"]["requires"]]:
        name = re.split(r"[\[<>=;]", requirement)[0].strip()
        assert name == "vecmill" or re.search(rf"^\| `{re.escape(name)}` \| \S", DEPENDENCIES, re.M), name
