"""Cutting a corpus, reading and writing its shards, and taking up what is done: without Ray and without a model."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vecmill.cluster import corpus as corpora
from vecmill.cluster.corpus import Answer, Corpus, CorpusOptions, cut, finish, shard_rows, take_up, write_shard
from vecmill.tools.console import UsageError
from vecmill.tools.embed.batches import Failure, TextVector
from vecmill.tools.embed.inputs import opened
from vecmill.tools.embed.rows import TextRow, TextSource

BAD = "no vector for this"


def lengths(rows: Iterable[TextRow]) -> Iterator[tuple[TextRow, Answer]]:
    """A vector of two values that tells texts apart."""
    for row in rows:
        values = np.array([len(row.text), sum(row.text.encode())], "<f4").tobytes()
        yield row, Failure(422, "refused") if row.text == BAD else TextVector(values, "a/model", 3, 1)


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"id": number, "text": f"text {number}"} for number in range(count)]


def read(corpus: Corpus) -> list[list[TextRow]]:
    shards = []
    for shard in corpus.shards:
        with shard_rows(corpus, shard) as (rows, _):
            shards.append(list(rows))
    return shards


def work(output: Path | str, corpus: Corpus, numbers: Iterable[int] | None = None) -> None:
    for number in range(len(corpus.shards)) if numbers is None else numbers:
        write_shard(str(output), corpus, number, lengths, "a/model", 2)


@given(sizes=st.lists(st.integers(0, 50), max_size=20), most=st.integers(1, 60))
def test_row_groups_are_cut_without_a_gap_into_shards_of_at_most_so_many_rows(sizes: Sequence[int], most: int) -> None:
    ranges = list(corpora._of_groups(sizes, most))

    assert sum(rows for _, rows in ranges) == sum(sizes)
    assert all(0 < rows <= most for _, rows in ranges)
    assert [first for first, _ in ranges] == [sum(rows for _, rows in ranges[:index]) for index in range(len(ranges))]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("most", [1, 7, 10, 100])
def test_the_shards_of_a_file_are_what_vecmill_embed_reads_of_it(tmp_path: Path, kind: str, most: int) -> None:
    rows = numbered(23)
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
    else:
        jsonl(path, rows)
        # Blank lines count, the last one need not end, and a text may have the other kind of line end in it.
        content = path.read_bytes().replace(b"\n", b"\n\n", 3) + b'{"id": 99, "text": "a\\u2028b"}'
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    with opened(TextSource(path)) as (expected, _):
        whole = list(expected)

    shards = read(cut(CorpusOptions((str(path),), shard_rows=most)))

    assert [row for shard in shards for row in shard] == whole
    assert kind.endswith("gz") or max(map(len, shards)) <= most


def test_several_files_are_found_in_folders_and_ids_are_unique(tmp_path: Path) -> None:
    inner = tmp_path / "corpus" / "inner"
    inner.mkdir(parents=True)
    a = jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    b = jsonl(inner / "b.ndjson", [{"text": "three"}])
    jsonl(inner / ".hidden.jsonl", [{"text": "not this"}])
    (inner / "notes.md").write_text("nor this")

    corpus = cut(CorpusOptions((str(tmp_path / "corpus"),)))

    assert [row.id for shard in read(corpus) for row in shard] == [f"{a}:1", f"{a}:2", f"{b}:1"]
    assert not corpus.integer_ids


def test_the_output_has_each_row_once_with_its_vector_and_the_errors_beside_it(tmp_path: Path) -> None:
    rows = [*numbered(9), {"id": 9, "text": BAD}]
    options = CorpusOptions((str(jsonl(tmp_path / "a.jsonl", rows)),), shard_rows=4)
    output = tmp_path / "out"

    corpus, done = take_up(str(output), options)
    work(output, corpus)
    corpus, done = take_up(str(output), options)
    finish(str(output), corpus, done)

    table = pq.read_table(output)
    assert table.column("id").to_pylist() == list(range(10))
    assert table.column("text").to_pylist() == [row["text"] for row in rows]
    assert table.column("embedding").to_pylist()[-2:] == [[6.0, sum(b"text 8")], None]
    assert table.schema.metadata[b"model"] == b"a/model"
    (line,) = (output / "_part-000002.errors.jsonl").read_bytes().splitlines()
    assert orjson.loads(line) == {
        "file": str(tmp_path / "a.jsonl"), "row": 10, "id": 9, "status": 422, "message": "refused"
    }  # fmt: skip
    complete = orjson.loads((output / "_manifest.json").read_bytes())["complete"]
    assert complete == {"rows": 10, "failed": 1, "tokens": 27, "model": "a/model", "dimensions": 2}


def test_what_a_killed_run_left_is_taken_up_and_what_it_left_half_is_not(tmp_path: Path) -> None:
    options = CorpusOptions((str(jsonl(tmp_path / "a.jsonl", numbered(30))),), shard_rows=10)
    output = tmp_path / "out"
    corpus, _ = take_up(str(output), options)
    work(output, corpus, [0, 2])
    half = output / "_unfinished-0-part-000001.parquet"
    half.write_bytes(b"PAR1")

    again, done = take_up(str(output), options)

    assert again == corpus
    assert [(each.shard, each.rows, each.tokens) for each in done] == [(0, 10, 30), (2, 10, 30)]
    assert not half.exists()
    work(output, again, [1, 1])  # a worker that died behind its last write repeats it
    assert sorted(pq.read_table(output).column("id").to_pylist()) == list(range(30))


def test_an_output_of_something_else_is_refused_with_what_is_different(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(3))
    output = str(tmp_path / "out")
    take_up(output, CorpusOptions((str(path),)))

    with pytest.raises(UsageError, match="begun with another `shard_rows`"):
        take_up(output, CorpusOptions((str(path),), shard_rows=5))
    jsonl(path, numbered(4))
    with pytest.raises(UsageError, match=r"a\.jsonl has changed since"):
        take_up(output, CorpusOptions((str(path),)))
    corpus, _ = take_up(output, CorpusOptions((str(path),)), overwrite=True)
    assert corpus.rows == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        take_up(str(tmp_path / "other"), CorpusOptions((str(path),)))


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"id": 1, "text": "a"}, {"id": 2}], {}, r"Row 2 of .*a\.jsonl has no string in `text`; --skip-bad"),
        ([{"id": 1, "text": "a"}, {"id": "b", "text": "b"}], {}, "Row 2 .* --string-ids"),
        ([{"one": "a", "two": "b"}], {}, "--field"),
        ([], {}, "There are no texts"),
    ],
)
def test_rows_that_are_no_texts_end_it_with_a_sentence(
    tmp_path: Path, rows: Sequence[object], options: dict[str, Any], sentence: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows)

    with pytest.raises(UsageError, match=sentence):
        read(cut(CorpusOptions((str(path),), **options)))


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "a"}, {"id": 2}, {"id": "c", "text": "c"}])
    options = CorpusOptions((str(path),), skip_bad=True, string_ids=True)

    corpus, _ = take_up(str(tmp_path / "out"), options)
    done = write_shard(str(tmp_path / "out"), corpus, 0, lengths, "a/model", 2)

    assert (done.rows, done.skipped) == (2, {"has no string in `text`": 1})
    assert pq.read_table(tmp_path / "out").column("id").to_pylist() == ["1", "c"]


@pytest.mark.parametrize("given", ["nothing.jsonl", "table.csv", "nowhere://bucket/a.jsonl"])
def test_what_cannot_be_read_is_named(tmp_path: Path, given: str) -> None:
    (tmp_path / "table.csv").write_text("text\na\n")
    uri = given if "://" in given else str(tmp_path / given)

    with pytest.raises(UsageError, match=given):
        cut(CorpusOptions((uri,)))


def test_input_and_output_may_be_in_any_store_that_fsspec_knows() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/in/a.jsonl", b"".join(orjson.dumps(row) + b"\n" for row in numbered(5)))
    options = CorpusOptions(("memory://bucket/in",), shard_rows=2)

    corpus, _ = take_up("memory://bucket/out", options)
    work("memory://bucket/out", corpus)
    corpus, done = take_up("memory://bucket/out", options)

    assert [each.rows for each in done] == [2, 2, 1]
    assert sorted(memory.ls("/bucket/out", detail=False)) == [
        "/bucket/out/_manifest.json",
        *(f"/bucket/out/part-{number:06d}.parquet" for number in range(3)),
    ]
    with memory.open("/bucket/out/part-000001.parquet") as file:
        assert pq.read_table(file).column("id").to_pylist() == [2, 3]
