"""Vectors on disk, written in any order and read in theirs: a .npy file.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from vecmill.tools.embed.errors import EmbedError

FLOAT_BYTES = 4


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
            EmbedError: it has another size than the others, or there is no such text.
        """
        if len(values) != self._size or not 0 <= index < len(self._there):
            raise EmbedError(
                f"The vector of text {index} has {len(values) // FLOAT_BYTES} values where {self.dimensions} were "
                f"expected: was the server started with another model? Run the same command again."
            )
        self._write(index, values)
        self._there[index] = 1

    def fill(self) -> None:
        """NaN for the texts without a vector."""
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
