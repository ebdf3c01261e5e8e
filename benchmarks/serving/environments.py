"""Virtual environments for the servers that vecmill is compared with: made once, outside the repository."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

INSTALL_WITHIN_S = 1800.0
ERROR_LINES = 5


class Unavailable(Exception):
    """A server cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """The packages of one environment."""

    name: str
    requirements: Sequence[str]
    uninstalls: Sequence[str] = ()
    stand_in: tuple[str, str] | None = None
    """Name and version of a distribution that the code looks itself up by, where its package has another name."""


def default_folder() -> Path:
    """Where environments are kept."""
    named = os.environ.get("VECMILL_BENCHMARK_ENVIRONMENTS")
    return Path(named) if named else Path.home() / ".cache" / "vecmill" / "benchmarks"


def environment(recipe: Recipe, folder: Path) -> Path:
    """The folder of the recipe's environment, made if it is not there or was made from another recipe.

    Raises:
        Unavailable: an installation failed.
    """
    made = folder / recipe.name
    marker = made / "recipe.json"
    wanted = json.dumps({"python": sys.version_info[:2], **asdict(recipe)}, indent=2) + "\n"
    if marker.exists() and marker.read_text() == wanted:
        return made
    print(
        f"{recipe.name}: installing {' '.join(recipe.requirements)} into {made}, once; this takes minutes",
        file=sys.stderr,
        flush=True,
    )
    if made.exists():
        shutil.rmtree(made)
    _run(sys.executable, "-m", "venv", str(made))
    python = str(made / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *recipe.requirements)
    if recipe.uninstalls:
        _run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *recipe.uninstalls)
    if recipe.stand_in is not None:
        _add_stand_in(python, *recipe.stand_in)
    marker.write_text(wanted)  # last: an installation that was interrupted has none and is made again
    return made


def _add_stand_in(python: str, name: str, version: str) -> None:
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=INSTALL_WITHIN_S)
    except subprocess.CalledProcessError as error:
        last_lines = "\n".join(error.stderr.splitlines()[-ERROR_LINES:])
        raise Unavailable(f"`{' '.join(command)}` ended with status {error.returncode}:\n{last_lines}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{' '.join(command)}`: {error}") from None
    return done.stdout
