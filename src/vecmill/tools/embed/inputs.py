"""The readers of `vecmill embed`: JSON lines, CSV and TSV, folders of text files, and which reads what."""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import orjson

from vecmill.tools.console import UsageError
from vecmill.tools.embed import parquet
from vecmill.tools.embed.rows import STDIN, BadRow, InputTable, Record, TextRows, TextSource

GZIP = ".gz"
JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*JSON_LINES, *DELIMITERS, parquet.SUFFIX)
BOM = b"\xef\xbb\xbf"
LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit of 131,072 is below many a document
HUGE_BYTES = 10_000_000  # a file of a folder above this is data
ID, TEXT = "id", "text"  # the columns of a folder


@contextmanager
def opened(source: TextSource) -> Iterator[tuple[TextRows, InputTable]]:
    """Open an input: its texts, read lazily, and the table they are read from.

    Raises:
        UsageError: it is not there, not of a known kind, or what is in it is not that.
    """
    try:
        with _table(source) as table:
            yield TextRows(table, source), table
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{source.name} is a broken gzip file: {error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source.name} is not UTF-8 text: {error.reason}.") from error


@contextmanager
def _table(source: TextSource) -> Iterator[InputTable]:
    path = source.path
    if path == STDIN:
        yield _jsonl_table(sys.stdin.buffer)
    elif path.is_dir():
        yield _folder_table(path, source.patterns)
    else:
        kind = kind_of(path)
        with _open(path) as file:
            if kind == parquet.SUFFIX:
                yield parquet.parquet_table(file, source)
            elif kind in JSON_LINES:
                yield _jsonl_table(file)
            else:
                yield _delimited_table(file, DELIMITERS[kind], source.name)


def kind_of(path: Path) -> str:
    """The suffix that names the format, without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [GZIP]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    if not kind or kind[0] not in SUFFIXES or (packed and kind[0] == parquet.SUFFIX):
        raise UsageError(
            f"{path}: the name must end in one of {', '.join(SUFFIXES)}, all but the last also with {GZIP}, "
            f"or be a folder's, or - for JSONL on stdin."
        )
    return kind[0]


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.suffix.lower() == GZIP else file


def _jsonl_table(file: IO[bytes]) -> InputTable:
    """A row for each line that is not blank, numbered as its line. Source: https://jsonlines.org/"""
    return InputTable(jsonl_records(file))


def jsonl_records(lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, Record]]:
    """The records of lines that follow each other; the first is line `first` of its file."""
    for number, line in enumerate(lines, first):
        content = (line.removeprefix(BOM) if number == 1 else line).strip()
        if content:
            yield number, _jsonl_record(content)


def _jsonl_record(line: bytes) -> Record:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadRow(f"is not JSON ({error.msg})")
    return record if isinstance(record, dict | str) else BadRow("is neither an object nor a string")


def _delimited_table(file: IO[bytes], delimiter: str, name: str) -> InputTable:
    """A row for each record below the header (RFC 4180). A line break within quotes belongs to the text.

    Raises:
        UsageError: it has no header, or while it is read: it is no CSV.
    """
    csv.field_size_limit(LONGEST_FIELD)
    records = _delimited_lines(file, delimiter, name)
    header = next(records, None)
    if header is None:
        raise UsageError(f"{name} is empty; its first line must name the columns.")
    return InputTable(_delimited_records(records, header), dict.fromkeys(header, True))


def _delimited_lines(file: IO[bytes], delimiter: str, name: str) -> Iterator[list[str]]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from (fields for fields in reader if fields)  # none: a blank line
        except csv.Error as error:
            raise UsageError(f"Line {reader.line_num} of {name} is not a table's: {error}.") from error


def _delimited_records(records: Iterator[list[str]], header: Sequence[str]) -> Iterator[tuple[int, Record]]:
    for number, fields in enumerate(records, 1):
        yield number, dict(zip(header, fields, strict=False))


def _folder_table(folder: Path, patterns: Sequence[str]) -> InputTable:
    """A row for each text file below the folder, sorted by path, which is its id.

    Hidden files and links are not looked at; files that are binary, not UTF-8, empty, huge or unreadable are counted as
    skipped.
    """
    skipped: Counter[str] = Counter()
    return InputTable(_folder_records(folder, patterns, skipped), {ID: True, TEXT: True}, skipped)


def _folder_records(folder: Path, patterns: Sequence[str], skipped: Counter[str]) -> Iterator[tuple[int, Record]]:
    number = 0
    for path in _folder_files(folder):
        relative = path.relative_to(folder)
        if patterns and not any(relative.match(pattern) for pattern in patterns):
            continue
        text = _file_text(path, skipped)
        if text is not None:
            number += 1
            # Names need not be UTF-8, and what is sent must be.
            yield number, {ID: os.fsencode(relative.as_posix()).decode(errors="replace"), TEXT: text}


def _folder_files(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _file_text(path: Path, skipped: Counter[str]) -> str | None:
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
