"""sentence-transformers in this process with float32 weights: what every comparison is against."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH = 32
Vectors = npt.NDArray[np.float32]


def load_model(model_folder: Path) -> Any:
    """The SentenceTransformer of the folder, on its default device."""
    # Imported late: it takes seconds, and whoever asks a benchmark for --help should not wait for them.
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model_folder), local_files_only=True, model_kwargs={"dtype": "float32"})


def encode(
    encoder: Callable[..., Any], texts: Sequence[str], slice_size: int, advance: Callable[[int], None]
) -> Vectors:
    """Unit vectors, shape (texts, dimensions), from a model's encode method, one slice of texts at a time.

    The method sorts the texts of a call by length, so a larger slice wastes less on padding.
    """
    parts = []
    for start in range(0, len(texts), slice_size):
        part = list(texts[start : start + slice_size])
        parts.append(encoder(part, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False))
        advance(len(part))
    return np.concatenate(parts).astype(np.float32)
