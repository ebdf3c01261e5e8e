"""What is embedded: functions and classes of Python's standard library."""

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from benchmarks.bundled import MAX_TOKENS
from examples.codebase_search import extract_chunks
from tokenizers import Tokenizer

SEED = 20


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
