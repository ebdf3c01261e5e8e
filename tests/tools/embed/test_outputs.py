"""What is written, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.embed.batch_server import MODEL, BatchServer, answer, failure, vector
from tests.tools.embed.command_line import embed, embedded, write_jsonl
from vecmill.tools.console import CommandError
from vecmill.tools.embed.outputs import Vectors
from vecmill.tools.embed.parquet import ParquetWriter

VECTORS = st.lists(st.none() | st.binary(min_size=12, max_size=12), min_size=1)


def vectors_of(*texts: str) -> np.ndarray:
    return np.stack([np.frombuffer(vector(text), "<f4") for text in texts])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(deadline=None)
@given(values=VECTORS, data=st.data())
def test_vectors_written_in_any_order(
    values: list[bytes | None], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("vectors") / "v.npy"
    with Vectors(path, len(values), 3) as vectors:
        for index in data.draw(st.permutations(range(len(values)))):
            value = values[index]
            if value is not None:
                vectors.put(index, value)
        assert list(vectors.in_order()) == values
        assert [index in vectors for index in range(len(values))] == [value is not None for value in values]
        vectors.fill()
    written = np.load(path)
    assert written.dtype == np.float32
    assert written.shape == (len(values), 3)
    for row, value in zip(written, values, strict=True):
        assert np.isnan(row).all() if value is None else row.tobytes() == value


@pytest.mark.parametrize(("index", "size"), [(0, 8), (0, 16), (2, 12), (-1, 12)])
def test_a_vector_that_does_not_fit(index: int, size: int, tmp_path: Path) -> None:
    with Vectors(tmp_path / "v.npy", 2, 3) as vectors, pytest.raises(CommandError, match="another model"):
        vectors.put(index, bytes(size))


def test_parquet_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmill.tools.embed.parquet.ROW_GROUP_BYTES", 40)
    path = tmp_path / "out.parquet"
    rows = [(at, f"text {at}", None if at == 3 else vector(f"text {at}")) for at in range(7)]
    with ParquetWriter(path, 2, MODEL, integer_ids=True, with_text=True) as writer:
        for row in rows:
            writer.write(*row)
    assert pq.ParquetFile(path).num_row_groups == 4
    table = pq.read_table(path)
    assert table["id"].to_pylist() == list(range(7))
    assert table["embedding"].null_count == 1
    assert [
        None if value is None else np.array(value, "<f4").tobytes() for value in table["embedding"].to_pylist()
    ] == [row[2] for row in rows]


def test_parquet(batch_api: BatchServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", *({"id": f"a{at}", "text": f"text {at}"} for at in range(5)))
    out = tmp_path / "out.parquet"
    result = embedded(source, "-o", out, "--url", batch_api.url)
    table = pq.read_table(out)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    assert table.schema.metadata[b"model"] == MODEL.encode()
    assert table["id"].to_pylist() == [f"a{at}" for at in range(5)]
    assert table["text"].to_pylist() == [f"text {at}" for at in range(5)]
    assert np.array_equal(table["embedding"].to_pylist(), vectors_of(*(f"text {at}" for at in range(5))))
    assert pq.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"
    assert f"wrote     {out}: 5 vectors of 2 values ({MODEL})" in result.stdout
    assert "tokens    15\n" in result.stdout
    assert names(tmp_path) == ["in.jsonl", "out.parquet"]


def test_parquet_without_texts(batch_api: BatchServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "one")
    embedded(source, "-o", tmp_path / "out.parquet", "--no-text", "--url", batch_api.url)
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["id", "embedding"]


def test_npy_has_its_ids_beside_it(batch_api: BatchServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", {"id": "ü", "text": "one"}, {"id": 7, "text": "two"})
    embedded(source, "-o", tmp_path / "out.npy", "--url", batch_api.url)
    assert np.array_equal(np.load(tmp_path / "out.npy"), vectors_of("one", "two"))
    assert (tmp_path / "out.npy.ids.txt").read_text("utf-8") == "ü\n7\n"


def test_npy_of_rows_without_ids_is_alone(batch_api: BatchServer, tmp_path: Path) -> None:
    (tmp_path / "out.npy.ids.txt").write_text("of an earlier run\n", "utf-8")
    embedded(write_jsonl(tmp_path / "in.jsonl", "one", "two"), "-o", tmp_path / "out.npy", "--url", batch_api.url)
    assert names(tmp_path) == ["in.jsonl", "out.npy"]


def test_npy_has_no_place_for_ids_with_line_breaks(batch_api: BatchServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", {"id": "a\nb", "text": "one"})
    result = embed(source, "-o", tmp_path / "out.npy", "--url", batch_api.url)
    assert result.exit_code == 2
    assert "write .npz or .parquet" in result.stderr
    assert batch_api.batches == []
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("ids", [["a\nb", "ü"], [7, 8]])
def test_npz(batch_api: BatchServer, ids: list[object], tmp_path: Path) -> None:
    rows = ({"id": identity, "text": f"text {identity}"} for identity in ids)
    embedded(write_jsonl(tmp_path / "in.jsonl", *rows), "-o", tmp_path / "out.npz", "--url", batch_api.url)
    with np.load(tmp_path / "out.npz") as archive:
        assert sorted(archive) == ["embeddings", "ids"]
        assert archive["ids"].tolist() == ids
        assert np.array_equal(archive["embeddings"], vectors_of(*(f"text {identity}" for identity in ids)))


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet"])
def test_texts_without_a_vector_are_listed(batch_api: BatchServer, suffix: str, tmp_path: Path) -> None:
    batch_api.run = lambda line: failure(line, 400, "too long") if "long" in line["body"]["input"] else answer(line)
    rows = [{"id": f"a{at}", "text": "long" if at in (1, 3) else "short"} for at in range(4)]
    source, out = write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / f"out.{suffix}"
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == 1
    assert f"failed    2, listed in {out}.errors.jsonl\nerror     400: too long\n" in result.stdout
    assert [orjson.loads(line) for line in Path(f"{out}.errors.jsonl").read_bytes().splitlines()] == [
        {"row": row, "id": f"a{row - 1}", "status": 400, "message": "too long"} for row in (2, 4)
    ]
    assert missing(out) == [False, True, False, True]
    assert len(batch_api.batches) == 1

    batch_api.run = answer
    embedded(source, "-o", out, "--overwrite", "--url", batch_api.url)
    assert missing(out) == [False] * 4
    assert not Path(f"{out}.errors.jsonl").exists()


def missing(out: Path) -> list[bool]:
    """For each text, whether it has no vector."""
    if out.suffix == ".parquet":
        nulls: list[bool] = pq.read_table(out)["embedding"].is_null().to_pylist()
        return nulls
    loaded = np.load(out)
    array = loaded if out.suffix == ".npy" else loaded["embeddings"]
    return [bool(absent) for absent in np.isnan(array).all(axis=1)]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("out.txt", (), "out.txt: the name must end in one of .parquet, .npy, .npz."),
        ("there.npy", (), "there.npy is there already: give --overwrite or another name."),
        ("nowhere/out.npy", (), "nowhere/out.npy: there is no folder"),
        ("out.npy", ("--query", "--prompt-name", "x"), "give one of them"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_sent(
    batch_api: BatchServer, name: str, options: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "there.npy").write_bytes(b"kept")
    source = write_jsonl(tmp_path / "in.jsonl", "one")
    result = embed(source, "-o", tmp_path / name, *options, "--url", batch_api.url)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert batch_api.received == []
    assert (tmp_path / "there.npy").read_bytes() == b"kept"


def test_overwrite_replaces_at_the_end(batch_api: BatchServer, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    out.write_bytes(b"before")
    source = write_jsonl(tmp_path / "in.jsonl", "one")
    batch_api.ends_as = lambda number: "failed"
    assert embed(source, "-o", out, "--overwrite", "--url", batch_api.url).exit_code == 1
    assert out.read_bytes() == b"before"
    batch_api.ends_as = lambda number: "completed"
    embedded(source, "-o", out, "--overwrite", "--url", batch_api.url)
    assert np.array_equal(np.load(out), vectors_of("one"))
