"""The file of vectors, in one of three formats, and the list of ids or errors beside it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson

from vecmill.tools.embed.errors import UsageError
from vecmill.tools.embed.options import Format, Output
from vecmill.tools.embed.parquet import ParquetWriter, require_pyarrow
from vecmill.tools.embed.requests import Prepared
from vecmill.tools.embed.vectors import Vectors

Failed = tuple[int, int | None, str]
"""Index, status and message of a text without a vector; in order of index wherever there are several."""


def check(output: Output) -> None:
    """Before any work.

    Raises:
        UsageError: it cannot be written, or must not be.
    """
    output.check()
    if output.format is Format.PARQUET:
        require_pyarrow()


def check_ids(output: Output, prepared: Prepared) -> None:
    """When the ids are known.

    Raises:
        UsageError: the format has no place for them.
    """
    if output.format is Format.NPY and prepared.multiline_ids:
        raise UsageError(
            f"An id has a line break, and {output.ids_path.name} beside an .npy has one id a line: "
            f"write .npz or .parquet."
        )


def write(output: Output, folder: Path, prepared: Prepared, vectors: Vectors, model: str) -> None:
    """Write it in the folder, then move it to where it belongs: half a file never has its name."""
    if output.format is Format.PARQUET:
        _write_parquet(folder, prepared, vectors, model, with_text=output.with_text).replace(output.path)
        return
    vectors.fill()
    if output.format is Format.NPZ:
        _write_npz(folder, prepared, vectors).replace(output.path)
    else:
        _write_ids(folder / "ids.txt", output.ids_path, prepared)
        vectors.path.replace(output.path)


def _write_parquet(folder: Path, prepared: Prepared, vectors: Vectors, model: str, *, with_text: bool) -> Path:
    path = folder / "out.parquet"
    texts = prepared.texts_in_order()
    rows = zip(prepared.rows(), texts, vectors.in_order(), strict=True)
    with ParquetWriter(
        path, vectors.dimensions, model, integer_ids=prepared.integer_ids, with_text=with_text
    ) as writer:
        for (_, identity), text, vector in rows:
            writer.write(identity, text, vector)
    return path


def _write_npz(folder: Path, prepared: Prepared, vectors: Vectors) -> Path:
    """As numpy.savez, whose arrays would have to be in memory."""
    path, ids = folder / "out.npz", folder / "ids.npy"
    dtype = np.dtype("<i8") if prepared.integer_ids else np.dtype(f"<U{prepared.longest_id}")
    with ids.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (prepared.texts,)}
        np.lib.format.write_array_header_1_0(file, header)
        for _, identity in prepared.rows():
            file.write(np.array(identity if prepared.integer_ids else str(identity), dtype).tobytes())
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(ids, "ids.npy")
        archive.write(vectors.path, "embeddings.npy")
    return path


def _write_ids(scratch: Path, path: Path, prepared: Prepared) -> None:
    """One a line, as TensorFlow's embedding projector reads labels; none where they are the rows' own numbers."""
    plain = True
    with scratch.open("w", encoding="utf-8", newline="\n") as file:
        for index, (_, identity) in enumerate(prepared.rows(), 1):
            plain = plain and identity == index
            file.write(f"{identity}\n")
    if plain:
        path.unlink(missing_ok=True)
    else:
        scratch.replace(path)


def write_errors(output: Output, scratch: Path, failures: Iterable[Failed], prepared: Prepared) -> None:
    """A line of JSON for each text without a vector: row, id, status, message. No file where there is none."""
    rows = enumerate(prepared.rows())
    failed = False
    with scratch.open("wb") as file:
        for index, status, message in failures:
            failed = True
            number, identity = next(row for at, row in rows if at == index)
            line = {"row": number, "id": identity, "status": status, "message": message}
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    if failed:
        scratch.replace(output.errors_path)
    else:
        output.errors_path.unlink(missing_ok=True)
