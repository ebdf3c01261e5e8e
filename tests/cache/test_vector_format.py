"""What is read back: no cosine changes by more than 1e-4, of whole vectors or of their first dimensions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vecmill.cache.vector_format import decode_values, encode_vectors
from vecmill.core.types import Matrix

MOST = 1e-4


def read_back(vectors: Matrix, smallest: int) -> tuple[Matrix, list[bytes]]:
    values = encode_vectors(vectors, smallest)
    found = decode_values({bytes([index]): value for index, value in enumerate(values)}, vectors.shape[1])
    return np.stack([found[bytes([index])] for index in range(len(values))]), values


def cosines(vectors: Matrix) -> list[float]:
    wide = vectors.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return [float(one @ other) for one, other in combinations(unit, 2)]


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(2, 6), st.integers(2, 40)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False).filter(lambda value: abs(value) > 1e-6),
    ),
    st.integers(1, 2),
)
def test_no_cosine_changes_by_more_than_it_may(vectors: Matrix, smallest: int) -> None:
    read, _ = read_back(vectors, smallest)
    for width in {smallest, vectors.shape[1]}:
        differences = np.subtract(cosines(vectors[:, :width]), cosines(read[:, :width]))
        assert np.abs(differences).max(initial=0.0) <= MOST * 1.001  # float64's own rounding


@pytest.mark.parametrize(("dimensions", "smallest"), [(384, 384), (1024, 32), (2560, 32), (4096, 4096)])
def test_ordinary_vectors_take_16_bits(dimensions: int, smallest: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((8, dimensions)).astype(np.float32)
    read, values = read_back(vectors, smallest)
    assert max(len(value) for value in values) <= 2.1 * dimensions
    assert np.abs(np.subtract(cosines(vectors), cosines(read))).max() <= MOST


def test_a_vector_that_16_bits_would_change_too_much_takes_32_and_is_exact() -> None:
    vectors = np.full((1, 4096), 0.001, np.float32)
    vectors[0, 7] = 1000  # beside it its neighbours would be rounded away
    read, [value] = read_back(vectors, 4)
    assert len(value) > 4 * 4096
    assert (read == vectors).all()


@pytest.mark.parametrize("fill", [0.0, 1e-38, 1e38])
def test_the_ends_of_the_scale(fill: float) -> None:
    vectors = np.full((1, 8), fill, np.float32)
    read, _ = read_back(vectors, 8)
    assert np.allclose(read, vectors, rtol=1e-4)
    assert np.isfinite(read).all()


def test_exact_is_exact() -> None:
    vectors = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    values = encode_vectors(vectors, 16, exact=True)
    found = decode_values(dict(zip([b"0", b"1", b"2", b"3"], values, strict=True)), 16)
    assert all((found[str(index).encode()] == vector).all() for index, vector in enumerate(vectors))


def test_what_is_damaged_is_left_out() -> None:
    vectors = np.ones((1, 16), np.float32)
    [short] = encode_vectors(vectors, 16)
    [whole] = encode_vectors(vectors, 16, exact=True)
    infinite = b"\0\0\xc0\x7f" + short[4:]
    values = {
        b"a": short[:-1],
        b"b": b"",
        b"c": infinite,
        b"d": whole + b"\0" * 4,
        b"e": b"\xff" * len(whole),
        b"f": short,
    }
    assert list(decode_values(values, 16)) == [b"f"]
