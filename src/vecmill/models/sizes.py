"""How many parameters a checkpoint has, from the headers of its files. Reads no tensors.

Source of the layout: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

LENGTH_BYTES = 8  # little-endian, before the header
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def parameters(files: Iterable[Path]) -> int:
    """The elements of all tensors in safetensors files.

    Raises:
        OSError: one cannot be read.
        ValueError: one is damaged.
    """
    return sum(math.prod(tensor["shape"]) for file in files for tensor in _header(file).values())


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"{file.name} is not a safetensors file")
        header: dict[str, dict[str, list[int]]] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header
