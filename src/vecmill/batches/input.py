"""The input of a batch: validated as a whole, then read in groups of lines from an offset on.

Source: https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from vecmill.batches.record import LineError
from vecmill.core.errors import BodyTooLarge, InvalidInput
from vecmill.core.json_body import parse

MOST_ERRORS = 50  # as OpenAI shows
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LOOK_UP_EVERY = 256  # lines
DUPLICATES_AT_A_TIME = 1000
# In one line. Reading it holds the interpreter, for 20 ms where so many are numbers, and each takes 8 to 100 bytes.
MOST_COMMAS = 2_000_000


class Stopped(Exception):
    """The validation was asked to stop."""


@dataclass(slots=True)
class Checked:
    """The result of a validation. Without errors the file can be run."""

    first_offset: int = 0
    """Where the first line begins."""
    total: int = 0
    """Lines, without blank ones at the end."""
    errors: list[LineError] = field(default_factory=list)


def validate(path: str | Path, endpoint: str, max_line_bytes: int, stopped: Callable[[], bool]) -> Checked:
    """Read the file once, in memory that does not grow with what the lines hold.

    Raises:
        Stopped: `stopped` said so. OSError: it cannot be read.
    """
    checked = Checked()
    with open(path, "rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            checked.first_offset = len(BYTE_ORDER_MARK)
        hashes = _check_lines(file, checked, endpoint, max_line_bytes, stopped)
        if not checked.total and not checked.errors:
            checked.errors.append(LineError(code="empty_file", message="The input file has no lines."))
        if len(checked.errors) < MOST_ERRORS:
            checked.errors += _duplicates(file, checked, hashes, max_line_bytes, stopped)
            checked.errors.sort(key=lambda error: error.line or 0)
    return checked


def _check_lines(
    file: BinaryIO, checked: Checked, endpoint: str, max_line_bytes: int, stopped: Callable[[], bool]
) -> array[int]:
    """Append the errors of lines to `checked`; returns the hash of each valid custom_id (64 bits, secretly seeded)."""
    hashes, blank = array("q"), 0
    for number, raw in _raw_lines(file, checked.first_offset, max_line_bytes, stopped):
        if not raw.strip():
            blank = blank or number
            continue
        checked_line = _blank(blank) if blank else _check(raw, endpoint, max_line_bytes)
        checked.total, blank = number, 0
        if isinstance(checked_line, str):
            hashes.append(hash(checked_line))
        else:
            checked.errors.append(checked_line.model_copy(update={"line": checked_line.line or number}))
            if len(checked.errors) == MOST_ERRORS:
                break
    return hashes


def _raw_lines(
    file: BinaryIO, start: int, max_line_bytes: int, stopped: Callable[[], bool]
) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; of one that is too long, only the beginning."""
    file.seek(start)
    number = 0
    while raw := file.readline(max_line_bytes + 1):
        number += 1
        if number % LOOK_UP_EVERY == 0 and stopped():
            raise Stopped
        rest = raw
        while rest and len(rest) > max_line_bytes and not rest.endswith(b"\n"):
            rest = file.readline(max_line_bytes + 1)
        yield number, raw


def _blank(number: int) -> LineError:
    return LineError(code="invalid_json_line", message="This line is blank, and others follow.", line=number)


def _check(raw: bytes, endpoint: str, max_line_bytes: int) -> str | LineError:
    """The line's custom_id, or its error."""
    if len(raw) > max_line_bytes:
        return LineError(
            code="line_too_long", message=f"This line is longer than {max_line_bytes} bytes (MAX_BODY_BYTES)."
        )
    if raw.count(b",") > MOST_COMMAS:
        return LineError(
            code="line_too_long", message=f"This line has more than {MOST_COMMAS} values: split it into several."
        )
    try:
        entry = parse(raw)
    except BodyTooLarge as error:
        return LineError(code="line_too_long", message=f"This line is too much. {error.message}", param=error.param)
    except InvalidInput as error:
        return LineError(
            code="invalid_json_line", message=f"This line cannot be read. {error.message}", param=error.param
        )
    if not isinstance(entry, dict):
        return LineError(code="invalid_json_line", message="This line is not a JSON object.")
    return _check_fields(entry, endpoint)


def _check_fields(entry: dict[str, Any], endpoint: str) -> str | LineError:
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return _wrong("custom_id", "must be a string that is not empty", "missing_custom_id")
    if entry.get("method") != "POST":
        return _wrong("method", "must be POST", "invalid_method")
    if entry.get("url") != endpoint:
        return _wrong("url", f"must be {endpoint}, the endpoint of the batch", "invalid_url")
    if not isinstance(entry.get("body"), dict):
        return _wrong("body", "must be a JSON object", "invalid_body")
    return custom_id


def _wrong(param: str, problem: str, code: str) -> LineError:
    return LineError(code=code, message=f"`{param}` {problem}.", param=param)


def _duplicates(
    file: BinaryIO, checked: Checked, hashes: array[int], max_line_bytes: int, stopped: Callable[[], bool]
) -> list[LineError]:
    """Errors of repeated custom_ids. Only lines whose hashes are equal are read again."""
    ordered = np.sort(np.frombuffer(hashes, np.int64)) if hashes else np.empty(0, np.int64)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    room = MOST_ERRORS - len(checked.errors)
    for start in range(0, len(twice), DUPLICATES_AT_A_TIME):
        suspects = frozenset(twice[start : start + DUPLICATES_AT_A_TIME].tolist())
        errors = _really_equal(_raw_lines(file, checked.first_offset, max_line_bytes, stopped), suspects, room)
        if errors:
            return errors
    return []


def _really_equal(lines: Iterator[tuple[int, bytes]], suspects: frozenset[int], room: int) -> list[LineError]:
    first: dict[str, int] = {}
    errors: list[LineError] = []
    for number, raw in lines:
        custom_id = _custom_id(raw) if raw.count(b",") <= MOST_COMMAS else None
        if custom_id is None or hash(custom_id) not in suspects:
            continue
        if custom_id in first:
            message = f"The custom_id of this line is that of line {first[custom_id]} too; each must be unique."
            errors.append(LineError(code="duplicate_custom_id", message=message, line=number, param="custom_id"))
            if len(errors) == room:
                break
        first.setdefault(custom_id, number)
    return errors


def _custom_id(raw: bytes) -> str | None:
    try:
        entry = parse(raw)
    except (BodyTooLarge, InvalidInput):
        return None
    custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
    return custom_id if isinstance(custom_id, str) else None


# As much as keeps a device busy, and no more than may be repeated after a crash.
GROUP_TEXTS = 64
GROUP_BYTES = 262_144


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request of a batch."""

    number: int
    """From 1."""
    custom_id: str
    body: Mapping[str, Any]


class InputChanged(Exception):
    """The input is not what it was when it was validated."""


@dataclass(frozen=True, slots=True)
class LineGroup:
    """Consecutive lines, answered together."""

    lines: list[InputLine]
    texts: int
    size: int
    """In bytes."""
    stop: int
    """Where in the input the next line begins."""


class LineReader:
    """An input file that was found valid. For any thread, one at a time."""

    def __init__(self, path: str | Path, offset: int, done: int, total: int) -> None:
        """`done` of its `total` lines are before the offset."""
        self._path = path
        self._file: BinaryIO | None = None
        """None until `next` opens it. So its owner has the reader, and can close it, where opening it is cancelled."""
        self._offset = offset
        self._next = done + 1
        self._total = total

    def next(self, texts_of: Callable[[Mapping[str, Any]], int], most_lines: int) -> LineGroup | None:
        """The next lines, at least one; None after the last.

        Raises:
            InputChanged: they are not what was validated. OSError: they cannot be read.
        """
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115 - `close` closes it
            self._file.seek(self._offset)
        lines: list[InputLine] = []
        start, texts = self._offset, 0
        while (
            self._next <= self._total
            and len(lines) < most_lines
            and texts < GROUP_TEXTS
            and self._offset - start < GROUP_BYTES
        ):
            line = self._read(self._file)
            lines.append(line)
            texts += texts_of(line.body)
        return LineGroup(lines, texts, self._offset - start, self._offset) if lines else None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, file: BinaryIO) -> InputLine:
        raw = file.readline()
        try:
            entry = orjson.loads(raw)
            line = InputLine(self._next, entry["custom_id"], entry["body"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise InputChanged from None
        self._offset += len(raw)
        self._next += 1
        return line
