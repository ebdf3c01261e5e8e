"""Parquet, read and written. Source: https://arrow.apache.org/docs/python/parquet.html"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from vecmill import __version__
from vecmill.tools.console import UsageError
from vecmill.tools.embed.rows import Columns, InputTable, Record, TextSource, id_field_of, text_field_of

SUFFIX = ".parquet"
ROWS_AT_A_TIME = 1024  # of an input; they are in memory at one time
ROW_GROUP_BYTES = 64 * 1024 * 1024  # of an output, before compression; they are in memory at one time


def require_pyarrow() -> None:
    """Look whether pyarrow is installed.

    Raises:
        UsageError: it is not installed.
    """
    _arrow()


def _arrow(module: str = "pyarrow") -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError("Parquet files need pyarrow: pip install 'vecmill[parquet]'.") from error


def parquet_file(content: IO[bytes], source: TextSource) -> Any:
    """The `pyarrow.parquet.ParquetFile`, of which only the footer is read.

    Raises:
        UsageError: it is no Parquet file, or pyarrow is not installed.
    """
    arrow = _arrow()
    try:
        return _arrow("pyarrow.parquet").ParquetFile(content)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"{source.name} cannot be read as Parquet: {str(error).rstrip('.')}.") from error


def parquet_table(content: IO[bytes], source: TextSource, rows: range | None = None) -> InputTable:
    """The file's rows, or those of a range (from 0); only the columns and row groups that are used are read.

    Raises:
        UsageError: as `parquet_file`; or which column is which is not clear.
    """
    file = parquet_file(content, source)
    columns = columns_of(file)
    used = {text_field_of(columns, source), id_field_of(columns, source)} - {None}
    return InputTable(_records(file, sorted(map(str, used)), source.name, rows), columns)


def columns_of(file: Any) -> Columns:
    """The columns of a `parquet_file`."""
    return {column.name: _holds_strings(column.type) for column in file.schema_arrow}


def _holds_strings(kind: Any) -> bool:
    types = _arrow("pyarrow.types")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _records(file: Any, used: Sequence[str], name: str, rows: range | None) -> Iterator[tuple[int, Record]]:
    number, groups = _groups(file, rows)
    try:
        for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=groups, columns=used):
            before, number = number, number + len(batch)
            start, stop = (before, number) if rows is None else (max(before, rows.start), min(number, rows.stop))
            if start < stop:
                yield from enumerate(batch.slice(start - before, stop - start).to_pylist(), start + 1)
    except (_arrow().ArrowException, OSError) as error:
        raise UsageError(f"{name} is broken behind row {number}: {str(error).rstrip('.')}.") from error


def _groups(file: Any, rows: range | None) -> tuple[int, list[int]]:
    """The row groups that hold a range of rows, and how many rows are before them."""
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    if rows is None:
        return 0, list(range(len(sizes)))
    ends = list(accumulate(sizes))
    groups = [
        index
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if end - size < rows.stop and end > rows.start
    ]
    return (ends[groups[0]] - sizes[groups[0]] if groups else 0), groups


class ParquetWriter:
    """Writes ids, texts and vectors in row groups; a text without a vector gets a null."""

    def __init__(self, path: Path, dimensions: int, model: str, *, integer_ids: bool, with_text: bool) -> None:
        arrow = _arrow()
        self._arrow, self._dimensions = arrow, dimensions
        self._integer_ids, self._with_text = integer_ids, with_text
        columns = [
            ("id", arrow.int64() if integer_ids else arrow.string()),
            *([("text", arrow.string())] if with_text else []),
            ("embedding", arrow.list_(arrow.float32(), dimensions)),
        ]
        self._schema = arrow.schema(columns, metadata={"model": model, "created_by": f"vecmill {__version__}"})
        self._writer = _arrow("pyarrow.parquet").ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=False
        )
        self._ids: list[int | str] = []
        self._texts: list[str] = []
        self._vectors: list[bytes | None] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()

    def write(self, identity: int | str, text: str, vector: bytes | None) -> None:
        """Append a row; the vector is little-endian float32."""
        self._ids.append(identity if self._integer_ids else str(identity))
        self._vectors.append(vector)
        self._bytes += 4 * self._dimensions
        if self._with_text:
            self._texts.append(text)
            self._bytes += 4 * len(text)
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def note(self, metadata: Mapping[str, str]) -> None:
        """Add to what the file says of itself."""
        self._flush()
        self._writer.add_key_value_metadata(dict(metadata))

    def _flush(self) -> None:
        if not self._ids:
            return
        arrow, kinds = self._arrow, self._schema.types
        empty = bytes(4 * self._dimensions)
        values = np.frombuffer(b"".join(vector or empty for vector in self._vectors), "<f4")
        embedding = arrow.FixedSizeListArray.from_arrays(
            arrow.array(values, arrow.float32()),
            type=kinds[-1],
            mask=arrow.array([vector is None for vector in self._vectors]),
        )
        texts = [arrow.array(self._texts, kinds[1])] if self._with_text else []
        columns = [arrow.array(self._ids, kinds[0]), *texts, embedding]
        self._writer.write_batch(arrow.record_batch(columns, schema=self._schema), row_group_size=len(self._ids))
        self._ids, self._texts, self._vectors, self._bytes = [], [], [], 0
