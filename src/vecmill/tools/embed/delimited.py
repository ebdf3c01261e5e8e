"""CSV and TSV with a header. Source: https://www.rfc-editor.org/rfc/rfc4180"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import IO

from vecmill.tools.embed.errors import UsageError
from vecmill.tools.embed.rows import Record, Table

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit of 131,072 is below many a document


def delimited_table(file: IO[bytes], delimiter: str, name: str) -> Table:
    """A row for each record below the header. A line break within quotes belongs to the text.

    Raises:
        UsageError: it has no header, or while it is read: it is no CSV.
    """
    csv.field_size_limit(LONGEST_FIELD)
    records = _read(file, delimiter, name)
    header = next(records, None)
    if header is None:
        raise UsageError(f"{name} is empty; its first line must name the columns.")
    return Table(_records(records, header), dict.fromkeys(header, True))


def _read(file: IO[bytes], delimiter: str, name: str) -> Iterator[list[str]]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from (fields for fields in reader if fields)  # none: a blank line
        except csv.Error as error:
            raise UsageError(f"Line {reader.line_num} of {name} is not a table's: {error}.") from error


def _records(records: Iterator[list[str]], header: Sequence[str]) -> Iterator[tuple[int, Record]]:
    for number, fields in enumerate(records, 1):
        yield number, dict(zip(header, fields, strict=False))
