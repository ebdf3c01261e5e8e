"""For a model of which no numbers are published: what sentence-transformers makes of its files, as an example.

The library is not needed otherwise and may be missing. It runs here, in this process, without any code of the model's.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vecmill.core.errors import StartupError
from vecmill.core.types import ModelCard, Task
from vecmill.models.card_examples import ComparedTexts, Example, ScoreCheck, Tolerance, VectorCheck
from vecmill.models.keys import read_json

LIBRARY = "sentence_transformers"
FAULTS = (OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError)
"""What the library raises for files that it does not know."""
COSINE_OF_VECTORS = Tolerance(float32=1e-5, float16=2e-3, bfloat16=1e-2)
COSINES = Tolerance(float32=1e-4, float16=5e-3, bfloat16=2e-2)
LOGITS = Tolerance(float32=1e-3, float16=5e-2, bfloat16=2e-1)


def library() -> Any | None:
    """sentence-transformers, if it is installed."""
    try:
        return import_module(LIBRARY)
    except ImportError:
        return None


def library_example(card: ModelCard, folder: Path, texts: ComparedTexts) -> Example:
    """What the library gives in the type and on the device of the loaded model.

    Raises:
        StartupError: it is missing, cannot load these files, or would guess what is not in them.
    """
    module = library()
    if module is None:
        raise StartupError(f"{card.id}: sentence-transformers is not installed.")
    _require_described(card, folder)
    source = f"sentence-transformers {module.__version__}, computed now from the same files in {card.dtype}"
    options: dict[str, Any] = {
        "device": card.device.split()[0].partition(":")[0],
        "trust_remote_code": False,
        "local_files_only": True,
        "model_kwargs": {"dtype": card.dtype},
    }
    try:
        if card.task is Task.RERANK:
            return _reranker(module.CrossEncoder(str(folder), **options), card, texts, source)
        return _embedder(module.SentenceTransformer(str(folder), **options), card, texts, source)
    except FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise StartupError(
            f"{card.id}: no numbers of it are published, and sentence-transformers {module.__version__} cannot compute "
            f"any from its files: {reason}"
        ) from None


def _require_described(card: ModelCard, folder: Path) -> None:
    """Without modules.json the library guesses the pooling, and gives a decoder a scoring layer of random numbers."""
    if (folder / "modules.json").is_file():
        return
    names = read_json(card.id, folder / "config.json").get("architectures")
    classifies = isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)
    if card.task is Task.EMBED or not classifies:
        raise StartupError(
            f"{card.id}: no numbers of it are published, and its files do not tell sentence-transformers enough to "
            f"compute any: they have no modules.json."
        )


def _embedder(model: Any, card: ModelCard, texts: ComparedTexts, source: str) -> Example:
    both = (texts.query, *texts.documents)
    vectors = _rows(model.encode(list(both), prompt="", show_progress_bar=False, convert_to_numpy=False))
    query = _rows(model.encode_query([texts.query], show_progress_bar=False, convert_to_numpy=False))
    documents = _rows(model.encode_document(list(texts.documents), show_progress_bar=False, convert_to_numpy=False))
    bare = VectorCheck(
        kind="vectors", source=source, texts=both, vectors=_numbers(vectors), tolerance=COSINE_OF_VECTORS
    )
    prompted = ScoreCheck(
        kind="scores",
        source=source,
        queries=(texts.query,),
        documents=texts.documents,
        prompted="files",
        expected=_numbers(query @ documents.T),
        tolerance=COSINES,
    )
    return Example(model=card.id, task=card.task, checks=(bare, prompted))


def _reranker(model: Any, card: ModelCard, texts: ComparedTexts, source: str) -> Example:
    identity = import_module("torch").nn.Identity()
    pairs = [(texts.query, document) for document in texts.documents]
    logits = model.predict(pairs, activation_fn=identity, show_progress_bar=False, convert_to_tensor=True)
    check = ScoreCheck(
        kind="scores",
        source=source,
        queries=(texts.query,),
        documents=texts.documents,
        expected=_numbers(logits.float().cpu().numpy()[None]),
        tolerance=LOGITS,
    )
    return Example(model=card.id, task=card.task, checks=(check,))


def _rows(vectors: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The unit vectors of tensors, which may be in bfloat16."""
    rows = np.stack([vector.float().cpu().numpy() for vector in vectors]).astype(np.float64)
    unit_rows: np.ndarray[Any, np.dtype[np.float64]] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit_rows


def _numbers(rows: np.ndarray[Any, Any]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in rows)
