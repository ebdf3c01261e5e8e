"""Lock files: complete, with hashes, for what pyproject.toml asks; and the tools that look at what is locked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from locks import licences
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^\s;]+)", re.M)
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")
FILES = sorted(path.name for path in LOCKS.glob("*.txt"))


def pinned(*names: str) -> dict[str, set[str]]:
    """The versions of each package in lock files."""
    versions: dict[str, set[str]] = {}
    for name in names:
        for package, version in PIN.findall((LOCKS / f"{name}.txt").read_text("utf-8")):
            versions.setdefault(canonicalize_name(package), set()).add(version)
    return versions


def wanted(extras: tuple[str, ...] = (), groups: tuple[str, ...] = ()) -> list[Requirement]:
    """What pyproject.toml asks for by name."""
    texts = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        texts += PROJECT["project"]["optional-dependencies"][extra]
    names = list(groups)
    for group in names:
        for entry in PROJECT["dependency-groups"][group]:
            if isinstance(entry, dict):
                names.append(entry["include-group"])
            else:
                texts.append(entry)
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_a_pin_with_hashes(name: str) -> None:
    """pip's --require-hashes asks for it; a lock without a pin would be an environment without packages."""
    text = re.sub(r"\\\n\s*", "", (LOCKS / name).read_text("utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert PIN.match(line), line
        assert HASH.search(line), line


@pytest.mark.parametrize(
    ("locks", "extras", "groups"),
    [
        (("server", "torch"), ("otel", "redis", "token-ids"), ()),
        (("server", "torch", "ray"), ("otel", "redis", "token-ids", "ray"), ()),
        (("dev", "torch"), ("otel", "parquet", "plot", "redis", "token-ids"), ("dev",)),
        (("ray-tests", "torch"), ("parquet", "ray", "ray-data", "redis", "token-ids"), ()),
    ],
    ids=lambda names: ",".join(names),
)
def test_what_the_project_asks_for_is_locked(
    locks: tuple[str, ...], extras: tuple[str, ...], groups: tuple[str, ...]
) -> None:
    """A dependency that is added, or asked for in another version, needs `make locks`."""
    there = pinned(*locks)
    for requirement in wanted(extras, groups):
        versions = there.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement.name} is in none of {locks}: make locks"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: make locks"


@pytest.mark.parametrize("name", ["server", "torch", "dev", "ray", "ray-tests", "build"])
def test_the_constraints_are_what_is_locked(name: str) -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    constraints = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for package, versions in pinned(name).items():
        assert versions <= {constraints.get(package, version) for version in versions}, f"{package}: make locks"


def test_a_package_has_one_version_everywhere() -> None:
    several = {
        package: versions
        for package, versions in pinned("server", "torch", "dev", "ray", "ray-tests", "build").items()
        if len(versions) > 1
    }
    # An older Python may need an older one of it, beside the newer in the same file.
    assert {package for package in several if several[package] != pinned("dev")[package]} == set()


def test_torch_without_cuda_is_the_same_torch() -> None:
    assert {version.removesuffix("+cpu") for version in pinned("torch-cpu")["torch"]} == pinned("torch")["torch"]


def test_the_sbom_lists_what_is_locked() -> None:
    bom = json.loads((LOCKS / "vecmill.cdx.json").read_text("utf-8"))
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    listed: dict[str, set[str]] = {}
    for component in bom["components"]:
        listed.setdefault(canonicalize_name(component["name"]), set()).add(component["version"])
        assert component["purl"].startswith("pkg:pypi/")
        assert any(told["hashes"] for told in component["externalReferences"])
    assert listed == pinned("server", "torch")
    version = re.search(r'"(.*)"', (ROOT / "src/vecmill/__init__.py").read_text("utf-8").rpartition("__version__")[2])
    assert version is not None
    assert bom["metadata"]["component"]["version"] == version[1]
    references = [component["bom-ref"] for component in bom["components"]]
    assert sorted(references) == sorted(bom["dependencies"][0]["dependsOn"])


def test_every_licence_that_is_installed_is_allowed() -> None:
    # In a process of its own: setuptools, once imported, adds packages that it brings along to the path.
    done = subprocess.run([sys.executable, licences.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("metadata", "wrong"),
    [
        ("License-Expression: MIT AND (Apache-2.0 OR BSD-3-Clause)", ""),
        ("Classifier: License :: OSI Approved :: MIT License", ""),
        ("License: MPL-2.0 AND MIT", ""),
        ("License-Expression: MIT AND AGPL-3.0-only", "AGPL-3.0-only"),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "GPLv3"),
        ("Summary: of nobody knows what", "none stated"),
    ],
)
def test_another_licence_is_named(metadata: str, wrong: str, tmp_path: Path) -> None:
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n{metadata}\n")
    sentences = licences.problems([PathDistribution(folder)])
    assert len(sentences) == bool(wrong)
    assert all("thing 1.0" in sentence and wrong in sentence for sentence in sentences)


def _audit(tmp_path: Path, answer: str, *options: str) -> tuple[int, str]:
    """The audit of a lock file, with a pip-audit that gives this answer."""
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{answer}\nEOF\n")
    program.chmod(0o755)
    command = [sys.executable, str(LOCKS / "audit.py"), "--pip-audit", str(program), *options, str(LOCKS / "build.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_a_vulnerability_is_named_with_its_cure(tmp_path: Path) -> None:
    found = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
    answer = json.dumps({"dependencies": [{"name": "thing", "version": "1.0", "vulns": [found]}], "fixes": []})
    code, said = _audit(tmp_path, answer)
    assert code == 1
    assert "PYSEC-1: thing 1.0, mended in 2.0" in said
    clean = json.dumps({"dependencies": [{"name": "thing", "version": "1.0", "vulns": []}], "fixes": []})
    assert _audit(tmp_path, clean)[0] == 0


@pytest.mark.parametrize(
    "answer",
    ["", '{"dependencies": [{"name": "thing", "skip_reason": "not found on PyPI and could not be audited"}]}'],
    ids=["no answer", "no answer for a package"],
)
def test_a_database_that_does_not_answer_is_not_taken_for_none_found(tmp_path: Path, answer: str) -> None:
    code, said = _audit(tmp_path, answer)
    assert (code, "NOT AUDITED" in said) == (2, True)
    code, said = _audit(tmp_path, answer, "--or-skip")
    assert (code, "SKIPPED, NOT AUDITED" in said) == (0, True)
