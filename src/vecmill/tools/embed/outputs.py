"""The file of vectors, in one of three formats, and the list of ids or errors beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import orjson

from vecmill.tools.console import CommandError, UsageError
from vecmill.tools.embed.parquet import ParquetWriter, require_pyarrow
from vecmill.tools.embed.requests import Prepared

FLOAT_BYTES = 4
Failed = tuple[int, int | None, str]
"""Index, status and message of a text without a vector; in order of index wherever there are several."""


class Format(StrEnum):
    """What is written, by the output's suffix."""

    PARQUET = ".parquet"
    NPY = ".npy"
    NPZ = ".npz"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """What is written, and where."""

    path: Path
    overwrite: bool = False
    with_text: bool = True

    @property
    def format(self) -> Format:
        """The format that the suffix names.

        Raises:
            UsageError: it is none of the three.
        """
        try:
            return Format(self.path.suffix.lower())
        except ValueError:
            raise UsageError(f"{self.path}: the name must end in one of {', '.join(Format)}.") from None

    @property
    def errors_path(self) -> Path:
        """Where the rows without a vector are listed."""
        return self.path.with_name(f"{self.path.name}.errors.jsonl")

    @property
    def ids_path(self) -> Path:
        """Where the ids of an .npy are, which has no place for them."""
        return self.path.with_name(f"{self.path.name}.ids.txt")

    def check(self) -> None:
        """Look, before any work, whether the output can be written.

        Raises:
            UsageError: it cannot be written, or must not be.
        """
        if self.format is Format.PARQUET:
            require_pyarrow()
        if not self.path.parent.is_dir():
            raise UsageError(f"{self.path}: there is no folder {self.path.parent}.")
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder.")
        if self.path.exists() and not self.overwrite:
            raise UsageError(f"{self.path} is there already: give --overwrite or another name.")


class Vectors:
    """float32 of shape (texts, dimensions).

    Written with the file's own calls: through a memory map a full disk would be a SIGBUS, not an error.
    """

    def __init__(self, path: Path, texts: int, dimensions: int) -> None:
        self.path, self.dimensions = path, dimensions
        self._size = FLOAT_BYTES * dimensions
        self._there = bytearray(texts)
        self._file = path.open("w+b", buffering=0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (texts, dimensions)}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, index: int) -> bool:
        return bool(self._there[index])

    def put(self, index: int, values: bytes) -> None:
        """A text's vector, as little-endian float32.

        Raises:
            CommandError: it has another size than the others, or there is no such text.
        """
        if len(values) != self._size or not 0 <= index < len(self._there):
            raise CommandError(
                f"The vector of text {index} has {len(values) // FLOAT_BYTES} values where {self.dimensions} were "
                f"expected: was the server started with another model? Run the same command again."
            )
        self._write(index, values)
        self._there[index] = 1

    def fill(self) -> None:
        """Write NaN for the texts without a vector."""
        empty = np.full(self.dimensions, np.nan, "<f4").tobytes()
        for index, there in enumerate(self._there):
            if not there:
                self._write(index, empty)

    def in_order(self) -> Iterator[bytes | None]:
        """Each text's vector; None where there is none."""
        self._file.seek(self._start)
        for there in self._there:
            values = self._file.read(self._size)
            yield values if there else None

    def _write(self, index: int, values: bytes) -> None:
        self._file.seek(self._start + index * self._size)
        rest = memoryview(values)
        while rest:  # without a buffer a write may stop short, as on a disk that is nearly full
            rest = rest[self._file.write(rest) :]


def check_ids(output: OutputFile, prepared: Prepared) -> None:
    """Look, once the ids are known, whether the format can hold them.

    Raises:
        UsageError: the format has no place for them.
    """
    if output.format is Format.NPY and prepared.multiline_ids:
        raise UsageError(
            f"An id has a line break, and {output.ids_path.name} beside an .npy has one id a line: "
            f"write .npz or .parquet."
        )


def write(output: OutputFile, folder: Path, prepared: Prepared, vectors: Vectors, model: str) -> None:
    """Write the output in the scratch folder, then move it into place: no unfinished file ever has its name."""
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
    """Ids and vectors are mapped from files, so that neither has to be in memory."""
    path, ids = folder / "out.npz", folder / "ids.npy"
    dtype = np.dtype("<i8") if prepared.integer_ids else np.dtype(f"<U{prepared.longest_id}")
    with ids.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (prepared.texts,)}
        np.lib.format.write_array_header_1_0(file, header)
        for _, identity in prepared.rows():
            file.write(np.array(identity if prepared.integer_ids else str(identity), dtype).tobytes())
    np.savez(path, ids=np.load(ids, mmap_mode="r"), embeddings=np.load(vectors.path, mmap_mode="r"))
    return path


def _write_ids(scratch: Path, path: Path, prepared: Prepared) -> None:
    """Write an id on each line, as TensorFlow's embedding projector reads labels; no file where ids are row numbers."""
    plain = True
    with scratch.open("w", encoding="utf-8", newline="\n") as file:
        for index, (_, identity) in enumerate(prepared.rows(), 1):
            plain = plain and identity == index
            file.write(f"{identity}\n")
    if plain:
        path.unlink(missing_ok=True)
    else:
        scratch.replace(path)


def write_errors(output: OutputFile, scratch: Path, failures: Iterable[Failed], prepared: Prepared) -> None:
    """Write a line of JSON for each text without a vector: row, id, status, message. No file where there is none."""
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
