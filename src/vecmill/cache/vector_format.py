"""Vectors as bytes: integers of 16 bits with a scale for each 16 dimensions, or float32 where those would not do.

One scale for a whole vector would leave little of the dimensions beside a large one, and models have such.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vecmill.core.types import Matrix, Vector

BLOCK = 16  # dimensions
LARGEST = 32_767
# Of a value of the vector when it has length 1, whole and cut to fewer dimensions. The forward pass has the rest of the
# 1e-5 and the 3e-5 that are stated.
LARGEST_ERROR, LARGEST_ERROR_CUT = 8e-6, 2.8e-5
# The sine of the angle between a vector and what is read back. A cosine is of two, so that it changes by twice this at
# the most, which is 1e-4.
LARGEST_SINE = 5e-5
SHORT, WHOLE = b"\x11", b"\x20"  # bits for each dimension, and which way: the first byte


def encode_vectors(vectors: Matrix, smallest: int, *, exact: bool = False) -> list[bytes]:
    """(n, d) -> n times bytes.

    16 bits where, at length 1, no value of the vectors changes by over 8e-6, no value of their first dimensions
    (`smallest` of them or more) by over 2.8e-5, and no cosine by over 1e-4; else, and where `exact`, as they are.
    """
    if exact:
        return [_whole(vector) for vector in vectors]
    count, dimensions = vectors.shape
    blocks = _blocks(dimensions)
    padded = np.zeros((count, blocks * BLOCK), np.float32)
    padded[:, :dimensions] = vectors
    parts = padded.reshape(count, blocks, BLOCK)
    short_scales = _upper_half(np.abs(parts).max(axis=2) / np.float32(LARGEST))
    scales = _scales(short_scales)
    divisors = np.where(scales > 0, scales, 1)[:, :, None]
    rounded = np.rint(parts / divisors).clip(-LARGEST, LARGEST)
    read = (rounded * divisors).reshape(count, -1)[:, :dimensions]
    fits = _close_enough(vectors, read, smallest)
    records = np.empty(count, _record(dimensions))
    records["bits"], records["scales"] = SHORT[0], short_scales
    records["values"] = rounded.reshape(count, -1)[:, :dimensions]
    return [records[index].tobytes() if fits[index] else _whole(vectors[index]) for index in range(count)]


def _blocks(dimensions: int) -> int:
    return -(-dimensions // BLOCK)


def _record(dimensions: int) -> np.dtype[np.void]:
    blocks = _blocks(dimensions)
    return np.dtype([("bits", "u1"), ("scales", "<u2", (blocks,)), ("values", "<i2", (dimensions,))])


def _upper_half(scales: Matrix) -> NDArray[np.uint16]:
    """The upper half of a float32's bits, rounded up: no value may be beyond LARGEST times its scale."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    return ((bits.astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)


def _scales(short: NDArray[np.uint16]) -> Matrix:
    scales: Matrix = (short.astype(np.uint32) << 16).view(np.float32)
    return scales


def _close_enough(vectors: Matrix, read: Matrix, smallest: int) -> NDArray[np.bool_]:
    """Which vectors are read back well, whole and cut to any size from `smallest`: (n, d), (n, d) -> (n,)."""
    error = np.abs(vectors - read)
    values = np.abs(vectors)
    length, read_length = (np.sqrt(np.einsum("nd,nd->n", each, each, dtype=np.float64)) for each in (vectors, read))
    # A value at length 1 is off by its own error, and by that of the length which it is divided by.
    off = error.max(axis=1) * length + values.max(axis=1) * np.abs(read_length - length)
    good = off <= LARGEST_ERROR * length * read_length
    good &= np.sqrt(np.einsum("nd,nd->n", error, error, dtype=np.float64)) <= LARGEST_SINE * length
    if smallest < vectors.shape[1]:
        good &= _close_enough_cut(vectors, read, error, smallest)
    near: NDArray[np.bool_] = np.asarray(good)
    return near


@np.errstate(over="ignore", invalid="ignore")
def _close_enough_cut(vectors: Matrix, read: Matrix, error: Matrix, smallest: int) -> NDArray[np.bool_]:
    """`_close_enough` for each size from `smallest` up to the whole.

    Sizes are checked in blocks. For every size within a block, the error is at most that at the block's end and the
    length at least that at its start, so a check of these two covers them all. A model may layer-norm the whole vector
    before it is cut, which subtracts the mean: the smaller of the two lengths is used.
    """
    dimensions, values = vectors.shape[1], np.abs(vectors)
    starts = np.array([0, smallest, *range((smallest // BLOCK + 1) * BLOCK, dimensions, BLOCK)])

    def upto(ufunc: np.ufunc, each: NDArray[np.floating]) -> NDArray[np.float64]:
        parts = ufunc.reduceat(each, starts, axis=1).astype(np.float64)
        reached: NDArray[np.float64] = ufunc.accumulate(parts, axis=1)
        return reached

    def before(each: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each block's value at its start: the previous block's, and for the first block its own."""
        return np.concatenate([each[:, :1], each[:, :-1]], axis=1)

    mean = vectors.mean(axis=1, keepdims=True, dtype=np.float64)
    squares = upto(np.add, np.square(vectors))  # inf where it is too much for float32: such a vector is kept whole
    centred = squares - 2 * mean * upto(np.add, vectors) + np.append(starts[1:], dimensions) * mean**2
    square_length = before(np.minimum(squares, centred)).clip(0)
    length = np.sqrt(square_length)
    own = upto(np.maximum, error) + error.mean(axis=1, keepdims=True, dtype=np.float64)
    # How far a square of the length is off at the most: what it is off before a part, and what may be added in it.
    squares_off = np.abs(before(upto(np.add, np.square(read) - np.square(vectors))))
    squares_off += 2 * np.add.reduceat(values * error, starts, axis=1)
    off = own * square_length + upto(np.maximum, values) * squares_off / 2
    turned = np.sqrt(upto(np.add, np.square(error)))
    good = (off <= LARGEST_ERROR_CUT * square_length * length) & (turned <= LARGEST_SINE * length)
    near: NDArray[np.bool_] = np.asarray(good.all(axis=1))
    return near


def _whole(vector: Vector) -> bytes:
    return WHOLE + vector.astype("<f4").tobytes()


def decode_values(values: Mapping[bytes, bytes], dimensions: int) -> dict[bytes, Vector]:
    """The vectors, (dimensions,) each in float32, by the keys of the values. One that is damaged is left out."""
    record = _record(dimensions)
    short = {key: value for key, value in values.items() if value[:1] == SHORT and len(value) == record.itemsize}
    read = np.frombuffer(b"".join(short.values()), record)
    scales = _scales(read["scales"])
    vectors: Matrix = read["values"] * np.repeat(scales, BLOCK, axis=1)[:, :dimensions]
    sound: NDArray[np.bool_] = np.asarray(np.isfinite(scales).all(axis=1))
    by_key = {key: vector for key, vector, good in zip(short, vectors, sound, strict=True) if good}
    for key, value in values.items():
        if value[:1] == WHOLE and len(value) == 1 + 4 * dimensions:
            vector = np.frombuffer(value, "<f4", offset=1).astype(np.float32)
            if np.isfinite(vector).all():
                by_key[key] = vector
    return by_key
