"""The lowest versions that are installed for a test are the lowest that are allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_the_lowest_versions_allowed_are_those_that_are_tested() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in map(Requirement, allowed):
        [lowest] = [
            Version(specifier.version).release for specifier in requirement.specifier if specifier.operator == ">="
        ]
        # A range may begin with a series (12.560), whose first version has more parts (12.560.30).
        tested_release = Version(tested[requirement.name]).release
        assert tested_release[: len(lowest)] == lowest, requirement.name
        assert requirement.specifier.contains(tested[requirement.name])
