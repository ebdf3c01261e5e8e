"""Which reader reads what, by its name."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from vecmill.tools.embed import folder, parquet
from vecmill.tools.embed.delimited import DELIMITERS, delimited_table
from vecmill.tools.embed.errors import UsageError
from vecmill.tools.embed.jsonl import jsonl_table
from vecmill.tools.embed.options import STDIN, Source
from vecmill.tools.embed.rows import Rows, Table

GZIP = ".gz"
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_LINES, *DELIMITERS, parquet.SUFFIX)


@contextmanager
def opened(source: Source) -> Iterator[tuple[Rows, Table]]:
    """The texts, read as they are asked for, and what they are read from.

    Raises:
        UsageError: it is not there, not of a known kind, or what is in it is not that.
    """
    try:
        with _table(source) as table:
            yield Rows(table, source), table
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{source.name} is a broken gzip file: {error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source.name} is not UTF-8 text: {error.reason}.") from error


@contextmanager
def _table(source: Source) -> Iterator[Table]:
    path = source.path
    if path == STDIN:
        yield jsonl_table(sys.stdin.buffer)
    elif path.is_dir():
        yield folder.folder_table(path, source.patterns)
    else:
        kind = _kind(path)
        with _open(path) as file:
            if kind == parquet.SUFFIX:
                yield parquet.parquet_table(file, source)
            elif kind in JSON_LINES:
                yield jsonl_table(file)
            else:
                yield delimited_table(file, DELIMITERS[kind], source.name)


def _kind(path: Path) -> str:
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
