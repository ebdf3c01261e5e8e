"""Pieces of a folder's text and code files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

HUGE_BYTES = 1_000_000  # above this it is data or generated
LOOKED_AT_BYTES = 8192  # for a NUL, which no text has
SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})


def files(folder: Path) -> list[Path]:
    """The files below the folder that may be text, sorted: none that are hidden, links, empty or huge."""
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        paths = (Path(where, name) for name in sorted(names) if not name.startswith("."))
        found.extend(path for path in paths if _may_be_text(path))
    return found


def _may_be_text(path: Path) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and 0 < path.stat().st_size <= HUGE_BYTES
    except OSError:
        return False


def chunks(path: Path, longest: int) -> Iterator[str]:
    """A file in pieces of two thirds of `longest` to `longest` characters, cut at line ends; none where binary."""
    try:
        content = path.read_bytes()
        if b"\0" in content[:LOOKED_AT_BYTES]:
            return
        rest = content.decode()
    except (OSError, UnicodeDecodeError):
        return
    while rest:
        piece = _piece(rest, longest)
        rest = rest[len(piece) :]
        if stripped := piece.strip():
            yield stripped


def _piece(rest: str, longest: int) -> str:
    """Up to the first line end behind two thirds of `longest`, or the last one before them, or anywhere."""
    if len(rest) <= longest:
        return rest
    end = rest.find("\n", longest * 2 // 3, longest) + 1 or rest.rfind("\n", 0, longest) + 1
    return rest[: end or longest]


def cut(text: str, longest: int) -> str:
    """The text's beginning, up to its last line end before `longest` characters, or to there."""
    if len(text) <= longest:
        return text
    end = text.rfind("\n", 0, longest)
    return text[: end if end > 0 else longest]
