"""The code: a virtual environment for each release, and a link to the one in use.

A release is built whole before the link moves, so what runs goes on running until then, and a build that fails leaves
nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from deployment.layout import Layout
from deployment.steps import Action, Link, Remove, Run, Scratch, Step, WriteFile

CLONE = Path(__file__).parents[1]
STAMP = "complete"
EXTRAS = "bundled,redis"
QUIET = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")


@dataclass(frozen=True)
class Release:
    """The release that this clone would install."""

    version: str
    folder: Path

    @classmethod
    def of_clone(cls, layout: Layout, python: str) -> Release:
        """The release of this clone, named after the version and a hash of all that goes into it."""
        match = re.search(r'__version__ = "(.*?)"', (CLONE / "src/vecmill/__init__.py").read_text("utf-8"))
        version = match[1] if match else "unknown"
        return cls(version, layout.real(layout.releases) / f"{version}-{_digest(python)}")

    @property
    def complete(self) -> bool:
        return (self.folder / STAMP).exists()


def _digest(python: str) -> str:
    digest = hashlib.sha256(f"{EXTRAS} {os.path.realpath(python)}".encode())
    for path in [CLONE / "pyproject.toml", CLONE / "constraints.txt", *sorted((CLONE / "src").rglob("*"))]:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(CLONE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def build(release: Release, layout: Layout, python: str) -> Step:
    """Make the release's environment, unless it is there."""
    title = f"Install vecmill {release.version}"
    undo = layout.invocation("--uninstall")
    if release.complete:
        return Step(title, (), undo, done="already there")
    folder = str(release.folder)
    python_of_it = f"{folder}/bin/python"
    return Step(
        title,
        (
            Scratch(release.folder),
            Run((python, "-m", "venv", folder)),
            Run(
                (
                    python_of_it,
                    "-m",
                    "pip",
                    "install",
                    *QUIET,
                    "--constraint",
                    str(CLONE / "constraints.txt"),
                    f"{CLONE}[{EXTRAS}]",
                ),
                shown=True,
            ),
            Run((f"{folder}/bin/vecmill", "version")),
            WriteFile(release.folder / STAMP, f"{release.version}\n"),
        ),
        f"nothing to undo, the unfinished installation was removed; all of it: {undo}",
    )


def in_use(layout: Layout) -> str | None:
    """The release that the link points at."""
    venv = layout.real(layout.venv)
    return venv.readlink().name if venv.is_symlink() else None


def switch(release: Release, layout: Layout) -> Link:
    """The link to the release."""
    return Link(layout.real(layout.venv), Path(release.folder.parent.name) / release.folder.name)


def outdated(release: Release, layout: Layout) -> tuple[Action, ...]:
    """Removals of all releases but this one and the one before, which is kept to go back to."""
    before, releases = in_use(layout), layout.real(layout.releases)
    if before == release.folder.name or not releases.is_dir():
        return ()
    kept = (release.folder.name, before)
    return tuple(Remove(path) for path in sorted(releases.iterdir()) if path.name not in kept)
