"""What is read of each kind of input."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.embed.command_line import write_jsonl
from vecmill.tools.console import UsageError
from vecmill.tools.embed.inputs import opened
from vecmill.tools.embed.rows import TextRow, TextSource

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def read(path: Path, **options: object) -> tuple[list[TextRow], dict[str, int]]:
    """The texts, and what was skipped."""
    with opened(TextSource(path, **options)) as (rows, table):  # type: ignore[arg-type]
        return list(rows), dict(table.skipped)


def texts(path: Path, **options: object) -> list[str]:
    return [row.text for row in read(path, **options)[0]]


@settings(deadline=None)
@given(rows=st.lists(TEXTS, min_size=1))
def test_jsonl_gives_back_what_was_written(rows: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("jsonl") / "in.jsonl", *({"text": row, "id": row} for row in rows))
    assert read(path)[0] == [TextRow(number, row, row) for number, row in enumerate(rows, 1)]


@settings(deadline=None)
@given(rows=st.lists(TEXTS.filter(lambda text: "\0" not in text), min_size=1), tabs=st.booleans())
def test_csv_gives_back_what_was_written(rows: list[str], tabs: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / ("in.tsv" if tabs else "in.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, "excel-tab" if tabs else "excel")
        writer.writerow(["id", "content"])
        writer.writerows([[f"00{at}", row] for at, row in enumerate(rows)])
    assert read(path)[0] == [TextRow(at + 1, f"00{at}", row) for at, row in enumerate(rows)]


@settings(deadline=None)
@given(rows=st.lists(TEXTS, min_size=1))
def test_parquet_gives_back_what_was_written(rows: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("parquet") / "in.parquet"
    pq.write_table(pa.table({"n": range(len(rows)), "passage": rows}), path, row_group_size=2)
    assert read(path, id_field="n")[0] == [TextRow(at + 1, at, row) for at, row in enumerate(rows)]


def test_bare_strings_blank_lines_and_a_bom(tmp_path: Path) -> None:
    path = tmp_path / "in.ndjson"
    path.write_bytes(b'\xef\xbb\xbf"one"\n\n  \r\n{"input": "two"}\r\n"three"')
    assert read(path)[0] == [TextRow(1, 1, "one"), TextRow(4, 4, "two"), TextRow(5, 5, "three")]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"body": "one"}\n', mtime=0))
    assert texts(path) == ["one"]
    table = tmp_path / "in.csv.gz"
    table.write_bytes(gzip.compress(b"document\none\n", mtime=0))
    assert texts(table) == ["one"]


def test_a_text_longer_than_the_csv_modules_own_limit(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"text\n{'x' * 200_000}\n", "utf-8")
    assert texts(path) == ["x" * 200_000]


def test_a_field_by_name_before_the_usual_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", {"text": "no", "title": "yes", "key": 7})
    assert read(path, text_field="title", id_field="key")[0] == [TextRow(1, 7, "yes")]


def test_the_only_field_with_strings(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", {"id": "a", "year": 1999, "abstract": "yes"})
    assert read(path)[0] == [TextRow(1, "a", "yes")]


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"a": "x", "b": "y"}, {}, "say with --field which field holds the texts; it has `a`, `b`."),
        ({"a": 1}, {}, "say with --field"),
        ({"a": "x"}, {"text_field": "b"}, "has no field `b` \\(--field\\); it has `a`."),
        ({"text": "x"}, {"id_field": "key"}, "has no field `key` \\(--id-field\\); it has `text`."),
    ],
)
def test_a_field_that_is_not_clear(row: object, options: dict[str, str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        read(write_jsonl(tmp_path / "in.jsonl", row), **options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": null}', "has no string in `text`"),
        (b'{"id": "b"}', "has no string in `text`"),
        (b'{"text": "", "id": "b"}', "has an empty `text`"),
        (b'{"text": "x", "id": 1.5}', "has neither a string nor an integer in `id`"),
        (b'{"text": "x"}', "has neither a string nor an integer in `id`"),
        (b'" "', "is an empty text"),
        (b"[1]", "is neither an object nor a string"),
        (b'{"text": "\\ud800", "id": 1}', "is not JSON"),
        (b"{", "is not JSON"),
    ],
)
def test_a_bad_row_is_named_or_skipped(row: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "one", "id": "a"}\n' + row + b'\n{"text": "three", "id": "c"}\n')
    with pytest.raises(UsageError, match=f"^Row 2 of .*in.jsonl {reason}.*; --skip-bad leaves such rows out.$"):
        read(path)
    rows, skipped = read(path, skip_bad=True)
    assert rows == [TextRow(1, "a", "one"), TextRow(3, "c", "three")]
    assert list(skipped.values()) == [1]
    assert next(iter(skipped)).startswith(reason)


def test_a_short_record_of_a_table_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('id,text\n1,"two\nlines"\n\n2\n3,x\n', "utf-8")
    with pytest.raises(UsageError, match=r"^Row 2 of .* has no string in `text`"):
        read(path)
    assert [row.id for row in read(path, skip_bad=True)[0]] == ["1", "3"]


def test_a_null_in_parquet_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["one", None]}), path)
    with pytest.raises(UsageError, match=r"^Row 2 "):
        read(path)


def test_dictionary_columns_hold_strings_too(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"n": [1, 2], "t": pa.array(["a", "a"]).dictionary_encode()}), path)
    assert texts(path) == ["a", "a"]


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("zwei ü", "utf-8")
    (tmp_path / "one.txt").write_text("eins", "utf-8")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / ".hidden").write_text("no", "utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no", "utf-8")
    (tmp_path / "link.txt").symlink_to(tmp_path / "one.txt")
    rows, skipped = read(tmp_path)
    assert rows == [TextRow(1, "one.txt", "eins"), TextRow(2, "b/two.md", "zwei ü")]
    assert skipped == {"is not UTF-8 text": 2, "is empty": 1}
    assert texts(tmp_path, patterns=("*.md",)) == ["zwei ü"]
    assert texts(tmp_path, patterns=("b/*.md", "o*")) == ["eins", "zwei ü"]
    assert read(tmp_path, patterns=("*.rst",)) == ([], {})


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x", "utf-8")
    (row,) = read(tmp_path)[0]
    assert row.id == "caf\ufffd.txt"
    assert orjson.dumps(row.id)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("in.txt", b"x", "the name must end in one of .jsonl, .ndjson, .csv, .tsv, .parquet"),
        ("in.parquet.gz", b"x", "the name must end in"),
        ("in.parquet", b"x", "cannot be read as Parquet"),
        ("in.jsonl.gz", b"x", "is a broken gzip file"),
        ("in.jsonl.gz", gzip.compress(b'"x"\n' * 999, mtime=0)[:-9], "is a broken gzip file"),
        ("in.csv", b"text\ncaf\xe9\n", "is not UTF-8 text"),
        ("in.csv", b"", "in.csv is empty"),
        ("in.csv", b'text\n"a"b\n', "Line 2 of .*in.csv is not a table's"),
        ("in.csv", b"a,b\n1,2\n", "say with --field"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.csv cannot be read: No such file"):
        read(tmp_path / "nowhere.csv")
