"""sentence-transformers on the same files: what our numbers are held against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=4)
def _sentence_transformer(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer  # slow to import: only for the tests that compare

    return SentenceTransformer(str(folder), device="cpu")


def st_encode(folder: Path, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
    """Unit vectors in float32: (n, dimensions)."""
    encoded: NDArray[np.float32] = _sentence_transformer(folder).encode(
        list(texts), prompt=prompt, normalize_embeddings=True, show_progress_bar=False
    )
    return encoded
