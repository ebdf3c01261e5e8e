"""Vectors as bytes: integers of 16 bits with a scale for each 64 dimensions, or float32 where those would not do.

One scale for a whole vector would leave little of the dimensions beside a large one, and models have such.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vecmill.core.types import Matrix, Vector

BLOCK = 64  # dimensions
LARGEST = 32_767
# The sine of the angle between a vector and what is read back. A cosine is of two, so that it changes by twice this at
# the most, which is 1e-4.
LARGEST_ERROR = 5e-5
SHORT, WHOLE = b"\x10", b"\x20"  # bits for each dimension: the first byte


def encode_vectors(vectors: Matrix, smallest: int, *, exact: bool = False) -> list[bytes]:
    """(n, d) -> n times bytes.

    16 bits where neither a cosine of the vectors nor of their first dimensions, `smallest` of them or more, changes by
    over 1e-4; else, and where `exact`, as they are.
    """
    if exact:
        return [_whole(vector) for vector in vectors]
    count, dimensions = vectors.shape
    blocks = _blocks(dimensions)
    padded = np.zeros((count, blocks * BLOCK), np.float32)
    padded[:, :dimensions] = vectors
    parts = padded.reshape(count, blocks, BLOCK)
    scales = np.abs(parts).max(axis=2) / np.float32(LARGEST)
    divisors = np.where(scales > 0, scales, 1)[:, :, None]
    rounded = np.rint(parts / divisors).clip(-LARGEST, LARGEST)
    fits = _close_enough(vectors, (rounded * divisors).reshape(count, -1)[:, :dimensions], smallest)
    records = np.empty(count, _record(dimensions))
    records["bits"], records["scales"] = SHORT[0], scales
    records["values"] = rounded.reshape(count, -1)[:, :dimensions]
    return [records[index].tobytes() if fits[index] else _whole(vectors[index]) for index in range(count)]


def _blocks(dimensions: int) -> int:
    return -(-dimensions // BLOCK)


def _record(dimensions: int) -> np.dtype[np.void]:
    blocks = _blocks(dimensions)
    return np.dtype([("bits", "u1"), ("scales", "<f4", (blocks,)), ("values", "<i2", (dimensions,))])


def _close_enough(vectors: Matrix, read: Matrix, smallest: int) -> NDArray[np.bool_]:
    error = np.cumsum(np.square(vectors - read, dtype=np.float64), axis=1)[:, smallest - 1 :]
    whole = np.cumsum(np.square(vectors, dtype=np.float64), axis=1)[:, smallest - 1 :]
    near: NDArray[np.bool_] = np.asarray(np.all(error <= LARGEST_ERROR**2 * whole, axis=1))
    return near


def _whole(vector: Vector) -> bytes:
    return WHOLE + vector.astype("<f4").tobytes()


def decode_values(values: Mapping[bytes, bytes], dimensions: int) -> dict[bytes, Vector]:
    """The vectors, (dimensions,) each in float32, by the keys of the values. One that is damaged is left out."""
    record = _record(dimensions)
    short = {key: value for key, value in values.items() if value[:1] == SHORT and len(value) == record.itemsize}
    read = np.frombuffer(b"".join(short.values()), record)
    vectors: Matrix = read["values"] * np.repeat(read["scales"], BLOCK, axis=1)[:, :dimensions]
    sound = np.isfinite(read["scales"]).all(axis=1)
    found = {key: vector for key, vector, good in zip(short, vectors, sound, strict=True) if good}
    for key, value in values.items():
        if value[:1] == WHOLE and len(value) == 1 + 4 * dimensions:
            vector = np.frombuffer(value, "<f4", offset=1).astype(np.float32)
            if np.isfinite(vector).all():
                found[key] = vector
    return found
