"""What is read back: no value changes by more than is stated, of whole vectors or of their first dimensions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from vecmill.cache.vector_format import decode_values, encode_vectors
from vecmill.core.types import Matrix

MOST = 1e-4
# Of a value at length 1, of all dimensions and of fewer: what is stated less what the forward pass takes of it.
MOST_OF_A_VALUE, MOST_OF_FEWER = 8.1e-6, 2.81e-5


def read_back(vectors: Matrix, smallest: int) -> tuple[Matrix, list[bytes]]:
    values = encode_vectors(vectors, smallest)
    decoded = decode_values({bytes([index]): value for index, value in enumerate(values)}, vectors.shape[1])
    return np.stack([decoded[bytes([index])] for index in range(len(values))]), values


def cosines(vectors: Matrix) -> list[float]:
    wide = vectors.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return [float(left @ right) for left, right in combinations(unit, 2)]


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


def worst_value(vectors: Matrix, read: Matrix) -> float:
    """How much a value changes at length 1."""
    original, restored = (each.astype(np.float64) for each in (vectors, read))
    return float(np.abs(unit(original) - unit(restored)).max())


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length: NDArray[np.float64] = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(length > 0, length, 1))


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(2, 70)),
        elements=st.floats(-1, 1, width=32, allow_subnormal=False),
    ),
    st.integers(1, 40),
    st.sampled_from([1, 30, 1000]),
)
def test_no_value_changes_by_more_than_it_may(vectors: Matrix, smallest: int, outlier: int) -> None:
    vectors[:, -1] *= outlier
    smallest = min(smallest, vectors.shape[1])
    read, _ = read_back(vectors, smallest)
    assert worst_value(vectors, read) <= MOST_OF_A_VALUE
    for width in range(smallest, vectors.shape[1]):
        assert worst_value(vectors[:, :width], read[:, :width]) <= MOST_OF_FEWER


@pytest.mark.parametrize("outlier", [0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize(("dimensions", "smallest"), [(384, 384), (768, 64), (1024, 32)])
def test_a_large_dimension_takes_nothing_from_the_others(dimensions: int, smallest: int, outlier: float) -> None:
    vectors = np.random.default_rng(1).standard_normal((200, dimensions)).astype(np.float32)
    vectors[:, dimensions // 3] += outlier
    read, _ = read_back(vectors, smallest)
    assert worst_value(vectors, read) <= MOST_OF_A_VALUE
    normed = [each - each.mean(axis=1, keepdims=True) for each in (vectors, read)]  # as nomic's are before a cut
    for width in (smallest, 2 * smallest - 5):
        assert worst_value(vectors[:, :width], read[:, :width]) <= MOST_OF_FEWER
        assert worst_value(normed[0][:, :width], normed[1][:, :width]) <= MOST_OF_FEWER


@pytest.mark.parametrize(("dimensions", "smallest"), [(384, 384), (1024, 32), (2560, 32), (4096, 4096)])
def test_ordinary_vectors_take_16_bits(dimensions: int, smallest: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((100, dimensions)).astype(np.float32)
    read, values = read_back(vectors, smallest)
    assert sum(len(value) for value in values) <= 2.2 * dimensions * len(values)
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
    decoded = decode_values(dict(zip([b"0", b"1", b"2", b"3"], values, strict=True)), 16)
    assert all((decoded[str(index).encode()] == vector).all() for index, vector in enumerate(vectors))


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
