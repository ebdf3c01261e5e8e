"""The images, as far as can be seen without an engine: hadolint, the files they copy, what their shell lines install.

What a build does is done here by its own lines, save that dependencies stay where they are.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest

import vecmill
from tests.docker.parts import DEFAULTS, DOCKER, DOCKERFILES, OTHERS, ROOT, SETTINGS, dockerfile, output, run, tool
from tests.servers import RunningServer, free_port, running, vecmill_command

IGNORED = [
    line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and not line.startswith("#")
]

DEPENDENCIES = ("locks", "requirements-bundled.txt")  # what changes seldom is copied first

each_dockerfile = pytest.mark.parametrize("name", DOCKERFILES)


@pytest.fixture(scope="module")
def small_server() -> Iterator[RunningServer]:
    port = free_port()
    with running(vecmill_command(port, "--max-batch-tokens", "512"), port, "/ready") as server:
        yield server


def _in_the_context(path: str) -> bool:
    """Whether `.dockerignore` lets a file pass: the last line that fits it, or a folder above it, decides."""
    above = [path, *(str(parent) for parent in Path(path).parents if parent != Path())]
    included = True
    for line in IGNORED:
        pattern = line.removeprefix("!").removeprefix("**/")
        names = (
            [Path(candidate).name for candidate in above]
            if "**/" in line
            else [candidate for candidate in above if "/" not in candidate]
        )
        if any(fnmatch(candidate, pattern) for candidate in names):
            included = line.startswith("!")
    return included


def _copies(name: str) -> list[list[str]]:
    """The arguments of each COPY of the builder's stage."""
    return [arguments.split() for kind, arguments in dockerfile(name).stages[0] if kind == "COPY"]


def _copy(sources: list[str], target: str, build: Path) -> None:
    """What COPY does with sources of the context."""
    for source in sources:
        for file in [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*")):
            relative = file.relative_to(ROOT)
            if file.is_file() and _in_the_context(str(relative)):
                place = build / target / (file.name if file == ROOT / source else file.relative_to(ROOT / source))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


@each_dockerfile
def test_hadolint_has_nothing_to_say(name: str) -> None:
    assert output([tool("hadolint"), str(DOCKER / name)]) == ""


@each_dockerfile
def test_everything_copied_is_in_the_context(name: str) -> None:
    for *sources, _ in _copies(name):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert _in_the_context(source), source


def test_nothing_else_is_in_the_context() -> None:
    assert {path.name for path in ROOT.iterdir() if _in_the_context(path.name)} == {
        "pyproject.toml",
        "locks",
        "requirements-bundled.txt",
        "README.md",
        "LICENSE",
        "src",
    }
    for secret in (".env", "src/vecmill/.env", ".git/config", "src/vecmill/__pycache__/app.cpython-312.pyc"):
        assert not _in_the_context(secret), secret
    assert _in_the_context("src/vecmill/http/dashboard/index.html")


@each_dockerfile
def test_a_change_of_the_source_installs_no_dependency_again(name: str) -> None:
    lines = dockerfile(name).stages[0]
    installs = next(n for n, (kind, text) in enumerate(lines) if kind == "RUN" and "locks/server.txt" in text)
    for number, (kind, text) in enumerate(lines):
        if kind == "COPY":
            assert (number > installs) == (text.split()[0] not in DEPENDENCIES), text


@pytest.mark.nightly
@each_dockerfile
def test_its_lines_install_the_package(name: str, tmp_path: Path) -> None:
    build, site = tmp_path / "build", tmp_path / "site"
    build.mkdir()
    # Dependencies, and what builds the package, are those that are here.
    variables = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PIP_TARGET": str(site),
        "PIP_UPGRADE": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_COMPILE": "1",
        "PIP_NO_INDEX": "1",
    }
    for kind, text in dockerfile(name).stages[0]:
        if kind == "COPY":
            *sources, target = text.split()
            _copy(sources, target, build)
        elif kind == "RUN" and "hatchling" in text:
            line = text.replace("/opt/build/bin/python", sys.executable).replace(
                "/opt/vecmill/bin/python", sys.executable
            )
            output(["/bin/sh", "-e", "-c", line], build, variables)
    here = {"PYTHONPATH": str(site), "PATH": variables["PATH"]}
    assert output([sys.executable, "-m", "vecmill", "version"], tmp_path, here).strip() == vecmill.__version__
    assert "serve" in output([sys.executable, "-m", "vecmill", "--help"], tmp_path, here)
    where = [sys.executable, "-c", "import vecmill; print(vecmill.__file__)"]
    assert output(where, tmp_path, here).startswith(str(site))
    _same_files(site / "vecmill", ROOT / "src" / "vecmill")


def _same_files(installed: Path, source: Path) -> None:
    """Templates and the like too, not only modules."""
    files = [
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [path for path in files if not (installed / path).is_file()] == []


@each_dockerfile
def test_every_package_that_is_installed_has_a_hash(name: str) -> None:
    """What the index is asked for is in a lock; only this package, built here, and a torch of another index are not."""
    lines = [text for kind, text in dockerfile(name).stages[0] if kind == "RUN"]
    installs = [part for text in lines for part in re.split(r"&&|;;|; then", text) if " install " in part]
    unlocked = [part for part in installs if "--no-deps --require-hashes" not in part]
    assert len(installs) - len(unlocked) >= 3
    assert [
        part for part in unlocked if "--no-index dist/*.whl" not in part and "*) pip install --no-deps" not in part
    ] == []
    for lock in re.findall(r"locks/[a-z-]+\.txt", "\n".join(lines)):
        assert (ROOT / lock).is_file(), lock
    assert "torch" not in re.findall(r"^([a-z0-9-]+)==", (ROOT / "locks/server.txt").read_text("utf-8"), re.M)


@pytest.mark.parametrize(
    ("index", "installed"),
    [
        ("", "--no-deps --require-hashes --requirement locks/torch.txt"),
        (
            "https://a/whl/cpu",
            "--no-deps --require-hashes --requirement locks/torch-cpu.txt --index-url https://a/whl/cpu",
        ),
        ("https://a/whl/cu130", "--no-deps --index-url https://a/whl/cu130 torch==2.13.0"),
    ],
)
def test_torch_comes_from_where_it_is_told(tmp_path: Path, index: str, installed: str) -> None:
    (line,) = [text for kind, text in dockerfile("Dockerfile").stages[0] if kind == "RUN" and "TORCH_INDEX" in text]
    shell = " ".join(word for word in line.split(" ") if not word.startswith("--mount="))
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    told = output(["/bin/sh", "-e", "-c", shell], ROOT, {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index})
    assert told.strip() == f"install {installed}"


@each_dockerfile
def test_bundled_bakes_the_model_in(name: str) -> None:
    assert "BUNDLED=0" in dockerfile(name).all("ARG")
    (line,) = [text for kind, text in dockerfile(name).stages[0] if kind == "RUN" and "BUNDLED" in text]
    assert '[ "$BUNDLED" = 1 ]' in line
    assert "--no-deps --require-hashes" in line.replace("\\\n", "")
    assert "requirements-bundled.txt" in line


@each_dockerfile
def test_variables_are_settings_that_are_valid(name: str) -> None:
    assert set(dockerfile(name).environment) <= SETTINGS | OTHERS
    assert dockerfile(name).environment["PORT"] == dockerfile(name).one("EXPOSE") == str(DEFAULTS["PORT"])


@each_dockerfile
def test_it_is_not_root_and_writes_to_volumes_only(name: str) -> None:
    image = dockerfile(name)
    volumes = json.loads(image.one("VOLUME"))
    assert image.one("USER") == "10001:10001"
    folders = ("HOME", "STATE_DIR", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    for folder in (image.environment[variable] for variable in folders):
        assert any(Path(folder).is_relative_to(volume) for volume in volumes), folder
    made = " ".join(image.all("RUN"))
    for volume in volumes:
        assert f"--owner=vecmill --group=vecmill --mode=0700 {volume}" in made or (
            f"--owner=vecmill --group=vecmill {volume}" in made
        )


@each_dockerfile
def test_signals_reach_the_server(name: str) -> None:
    image = dockerfile(name)
    assert json.loads(image.one("ENTRYPOINT")) == ["vecmill"]
    assert json.loads(image.one("CMD")) == ["serve"]
    assert image.one("STOPSIGNAL") == "SIGTERM"


@each_dockerfile
def test_the_health_check_asks_the_server(name: str, small_server: RunningServer) -> None:
    options, _, command = dockerfile(name).one("HEALTHCHECK").partition(" CMD ")
    assert "--start-period=600s" in options
    python, *arguments = json.loads(command)
    assert python == "python"

    def status(port: int) -> int:
        # A proxy for downloads is not asked for this machine.
        variables = {"PORT": str(port), "http_proxy": f"http://127.0.0.1:{free_port()}"}
        return run([sys.executable, *arguments], environment=variables).returncode

    assert httpx.get(f"{small_server.url}/ready").status_code == 200
    assert status(httpx.URL(small_server.url).port or 0) == 0
    assert status(free_port()) == 1


def test_both_images_run_alike() -> None:
    first, second = (dockerfile(name) for name in DOCKERFILES)
    ends = [image.stages[-1] for image in (first, second)]
    for kind in (
        "ENV",
        "VOLUME",
        "USER",
        "WORKDIR",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
        "LABEL",
    ):
        assert [text for name, text in ends[0] if name == kind] == [text for name, text in ends[1] if name == kind], (
            kind
        )


@each_dockerfile
def test_bases_are_pinned(name: str) -> None:
    defaults = dict(entry.split("=", 1) for entry in dockerfile(name).all("ARG"))
    for base in (entry.split()[0] for entry in dockerfile(name).all("FROM")):
        tag = base.partition("@")[0].rpartition(":")[2]
        tag = defaults[tag.strip("${}")] if tag.startswith("$") else tag
        assert tag[0].isdigit(), base
