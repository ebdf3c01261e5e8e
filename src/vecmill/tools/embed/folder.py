"""A folder's text files, each a text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vecmill.tools.embed.rows import Record, Table

HUGE_BYTES = 10_000_000  # above this it is data
ID, TEXT = "id", "text"


def folder_table(folder: Path, patterns: Sequence[str]) -> Table:
    """A row for each text file below the folder, sorted by path, which is its id.

    Hidden files and links are not looked at; files that are binary, not UTF-8, empty, huge or unreadable are counted as
    skipped.
    """
    skipped: Counter[str] = Counter()
    return Table(_records(folder, patterns, skipped), {ID: True, TEXT: True}, skipped)


def _records(folder: Path, patterns: Sequence[str], skipped: Counter[str]) -> Iterator[tuple[int, Record]]:
    number = 0
    for path in _files(folder):
        relative = path.relative_to(folder)
        if patterns and not any(relative.match(pattern) for pattern in patterns):
            continue
        text = _text(path, skipped)
        if text is not None:
            number += 1
            # Names need not be UTF-8, and what is sent must be.
            yield number, {ID: os.fsencode(relative.as_posix()).decode(errors="replace"), TEXT: text}


def _files(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _text(path: Path, skipped: Counter[str]) -> str | None:
    try:
        if path.stat().st_size > HUGE_BYTES:
            skipped[f"is larger than {HUGE_BYTES // 1_000_000} MB"] += 1
            return None
        content = path.read_bytes()
        text = None if b"\0" in content else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    except OSError:
        skipped["cannot be read"] += 1
        return None
    if text is None:
        skipped["is not UTF-8 text"] += 1
    elif not text.strip():
        skipped["is empty"] += 1
        return None
    return text
