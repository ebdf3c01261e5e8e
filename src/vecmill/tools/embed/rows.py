"""The rows of an input, whatever its format: which field holds the text and which the id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from vecmill.tools.console import UsageError

TEXT_FIELDS = ("text", "content", "input", "body", "document")
ID_FIELD = "id"
STDIN = Path("-")
INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class TextSource:
    """What is read, and which fields of it."""

    path: Path
    """`-`: JSONL on stdin."""
    text_field: str | None = None
    """None: guessed from the names and types."""
    id_field: str | None = None
    """None: `id` where there is one, else the row's number."""
    patterns: tuple[str, ...] = ()
    """Of a folder's files; none: all."""
    skip_bad: bool = False

    @property
    def name(self) -> str:
        """The name for messages."""
        return "stdin" if self.path == STDIN else str(self.path)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no text, and why."""

    reason: str


Record = Mapping[str, Any] | str | BadRow
"""Columns by name, a bare text, or neither."""
Columns = Mapping[str, bool]
"""The names of the columns, and whether each holds strings."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text to embed."""

    number: int
    """Where it stands in the input, from 1."""
    id: int | str
    text: str


@dataclass(frozen=True, slots=True)
class InputTable:
    """An input, being read."""

    records: Iterable[tuple[int, Record]]
    """With their row numbers, from 1."""
    columns: Columns | None = None
    """None: the first object says."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What the reader left out, by reason."""


def text_field_of(columns: Columns, source: TextSource) -> str:
    """The field that holds the texts: the one asked for, one of the usual names, or the only one with strings.

    Raises:
        UsageError: there is none, or which one is not clear.
    """
    listed = ", ".join(f"`{name}`" for name in columns) or "none"
    if source.text_field is not None:
        if source.text_field not in columns:
            raise UsageError(f"{source.name} has no field `{source.text_field}` (--field); it has {listed}.")
        return source.text_field
    usual = next((name for name in TEXT_FIELDS if name in columns), None)
    if usual is not None:
        return usual
    strings = [
        name for name, holds_strings in columns.items() if holds_strings and name != id_field_of(columns, source)
    ]
    if len(strings) != 1:
        raise UsageError(f"{source.name}: say with --field which field holds the texts; it has {listed}.")
    return strings[0]


def id_field_of(columns: Columns, source: TextSource) -> str | None:
    """The field that holds the ids; None: they are the rows' numbers.

    Raises:
        UsageError: the one asked for is not there.
    """
    if source.id_field is None:
        return ID_FIELD if ID_FIELD in columns else None
    if source.id_field not in columns:
        listed = ", ".join(f"`{name}`" for name in columns) or "none"
        raise UsageError(f"{source.name} has no field `{source.id_field}` (--id-field); it has {listed}.")
    return source.id_field


class TextRows:
    """The texts of a table, in order; what is skipped is counted in the table."""

    def __init__(self, table: InputTable, source: TextSource) -> None:
        self._table, self._source = table, source
        self._fields: tuple[str, str | None] | None = None if table.columns is None else self._choose(table.columns)

    def _choose(self, columns: Columns) -> tuple[str, str | None]:
        return text_field_of(columns, self._source), id_field_of(columns, self._source)

    def __iter__(self) -> Iterator[TextRow]:
        for number, record in self._table.records:
            row = self._row(number, record)
            if isinstance(row, TextRow):
                yield row
            elif self._source.skip_bad:
                self._table.skipped[row.reason] += 1
            else:
                raise UsageError(f"Row {number} of {self._source.name} {row.reason}; --skip-bad leaves such rows out.")

    def _row(self, number: int, record: Record) -> TextRow | BadRow:
        if isinstance(record, BadRow):
            return record
        if isinstance(record, str):
            return TextRow(number, number, record) if record.strip() else BadRow("is an empty text")
        if self._fields is None:
            self._fields = self._choose({name: isinstance(value, str) for name, value in record.items()})
        text_field, id_field = self._fields
        text = record.get(text_field)
        if not isinstance(text, str):
            return BadRow(f"has no string in `{text_field}`")
        if not text.strip():
            return BadRow(f"has an empty `{text_field}`")
        identity = number if id_field is None else record.get(id_field)
        if not _is_id(identity):
            return BadRow(f"has neither a string nor an integer in `{id_field}`")
        return TextRow(number, identity, text)


def _is_id(value: Any) -> TypeGuard[int | str]:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value in INT64)
