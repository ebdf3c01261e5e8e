"""What every client must be answered, from sentence-transformers and the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.oracle import st_encode
from tests.tiny_checkpoints import plain_tokenizer

# Newlines, accents, a character outside the basic plane and a script without spaces: what encodings get wrong.
TEXTS = [
    "def add(a, b):\n    return a + b",
    "Berlin has 3.5 million inhabitants.",
    "Grüße aus München: ein schöner Tag 🙂",
    "日本語の短い文です。",
    "a red apple",
]
LONG_TEXT = " ".join(f"The {number}th line is about embeddings." for number in range(100))

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "Berlin is known for its museums.",
    "def add(a, b): return a + b",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "Grüße aus München",
]


def expected(minilm_folder: Path) -> dict[str, object]:
    """As JSON for the clients' tests, which have neither torch nor numpy to count on."""
    tokenizer = plain_tokenizer(minilm_folder)
    vectors = st_encode(minilm_folder, [*TEXTS, LONG_TEXT, QUERY, *DOCUMENTS])
    embedded, long, query, documents = np.split(vectors, np.cumsum([len(TEXTS), 1, 1]))

    def tokens(texts: list[str]) -> int:
        return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))

    return {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "texts": TEXTS,
        "vectors": embedded.tolist(),
        "tokens": tokens(TEXTS),
        "long_text": LONG_TEXT,
        "long_vector": long[0].tolist(),
        "query": QUERY,
        "documents": DOCUMENTS,
        "cosines": (documents @ query[0]).tolist(),
        "rerank_tokens": tokens([QUERY, *DOCUMENTS]),
    }
