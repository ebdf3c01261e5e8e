"""The lines of an input file, a group at a time, from a place on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from vecmill.batches.endpoint import Line

# A group is answered together: as much as keeps a device busy, and no more than may be done again after a crash.
GROUP_TEXTS = 64
GROUP_BYTES = 262_144


class InputChanged(Exception):
    """The input is not what it was when it was validated."""


@dataclass(frozen=True, slots=True)
class Group:
    """Lines that follow each other."""

    lines: list[Line]
    texts: int
    size: int
    """In bytes."""
    stop: int
    """Where in the input the next line begins."""


class LineReader:
    """An open input file that was found valid. For any thread, one at a time."""

    def __init__(self, path: Path, offset: int, done: int, total: int) -> None:
        """`done` of its `total` lines are before the offset.

        Raises:
            OSError: it cannot be opened.
        """
        self._file = path.open("rb")
        self._file.seek(offset)
        self._offset = offset
        self._next = done + 1
        self._total = total

    def next(self, texts_of: Callable[[Mapping[str, Any]], int], most_lines: int) -> Group | None:
        """The next lines, at least one; None after the last.

        Raises:
            InputChanged: they are not what was validated. OSError: they cannot be read.
        """
        lines: list[Line] = []
        start, texts = self._offset, 0
        while (
            self._next <= self._total
            and len(lines) < most_lines
            and texts < GROUP_TEXTS
            and self._offset - start < GROUP_BYTES
        ):
            line = self._read()
            lines.append(line)
            texts += texts_of(line.body)
        return Group(lines, texts, self._offset - start, self._offset) if lines else None

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _read(self) -> Line:
        raw = self._file.readline()
        try:
            entry = orjson.loads(raw)
            line = Line(self._next, entry["custom_id"], entry["body"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise InputChanged from None
        self._offset += len(raw)
        self._next += 1
        return line
