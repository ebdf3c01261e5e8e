"""README, .env.example and the help say the same as the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from vecmill.__main__ import cli
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.config.env_example import default_text
from vecmill.config.settings import GROUPS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(load_settings())


def test_every_route_is_in_the_readme(app: FastAPI) -> None:
    missing = [
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if f"`{method.upper()} {path}`" not in README
    ]
    assert not missing
    assert "`GET /`" in README
    assert "`GET /docs`" in README


def test_every_route_in_the_readme_exists(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    for method, path in re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", README):
        assert path in ("/", "/docs") or method.lower() in paths[path], f"{method} {path}"


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    for group in GROUPS:
        for name, field in group.model_fields.items():
            row = next((line for line in README.splitlines() if line.startswith(f"| `{name.upper()}`")), None)
            assert row, f"README has no row for {name.upper()}"
            shown = default_text(field.default)
            assert not shown or f"`{shown}`" in row, f"README says another default for {name.upper()}: {row}"


def test_every_setting_is_a_flag_in_the_help() -> None:
    result = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for group in GROUPS:
        assert group.title in result.output
        for name in group.model_fields:
            assert f"--{name.replace('_', '-')}" in result.output
            assert name.upper() in result.output


def test_every_dependency_is_in_the_readme_with_its_reason() -> None:
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in wanted:
        name = re.split(r"[\[<>=;]", requirement)[0].strip()
        assert name == "vecmill" or re.search(rf"^\| `{re.escape(name)}` \| \S", README, re.M), name
