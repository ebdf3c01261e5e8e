"""A vector as a JSON value: floats, base64 of its bytes, or fewer bits for each dimension."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from math import sqrt
from typing import Literal, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from vecmill.core.types import Vector

Dtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
Quantized: TypeAlias = NDArray[np.int8] | NDArray[np.uint8]

# How far int8 reaches, in standard deviations of a unit vector's values (1 / sqrt(dimensions)). A fixed scale, so that
# vectors of different requests can be compared; what is beyond it is clipped.
REACH = 8.0


@dataclass(frozen=True, slots=True)
class EmbeddingFormat:
    """How a vector is written."""

    dtype: Dtype = "float"
    base64: bool = False
    """The bytes in base64 (floats as little-endian float32) instead of a list of numbers."""

    @property
    def characters(self) -> float:
        """About how many each dimension takes."""
        per_number = {"float": 12.0, "int8": 4.0, "uint8": 4.0, "binary": 0.5, "ubinary": 0.5}
        per_byte = {"float": 6.0, "int8": 1.4, "uint8": 1.4, "binary": 0.2, "ubinary": 0.2}
        return (per_byte if self.base64 else per_number)[self.dtype]


FLOAT, BASE64 = EmbeddingFormat(), EmbeddingFormat(base64=True)


def encode(vector: Vector, form: EmbeddingFormat) -> bytes:
    """One vector as finished JSON."""
    values = vector.astype("<f4", copy=False) if form.dtype == "float" else quantize(vector, form.dtype)
    if form.base64:
        return b'"%b"' % base64.b64encode(values.tobytes())
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


def quantize(vector: Vector, dtype: Dtype) -> Quantized:
    """A unit vector of d dimensions with 8 bits or 1 bit for each: (d,) -> (d,), or (ceil(d / 8),) for binary.

    Binary is the sign, the first dimension in the highest bit, as Cohere, Voyage and sentence-transformers pack it:
    `ubinary` as it is, `binary` less 128. `int8` is value x 127 x sqrt(d) / 8, rounded, within -127..127; `uint8` is
    that plus 128.
    """
    if dtype in ("binary", "ubinary"):
        bits: Quantized = np.packbits(vector > 0)
        return bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    reach = min(1.0, REACH / sqrt(len(vector)))
    scaled: Vector = np.clip(np.rint(vector * (127 / reach)), -127, 127)
    return scaled.astype(np.int8) if dtype == "int8" else (scaled + 128).astype(np.uint8)
