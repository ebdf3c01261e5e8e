"""How a server is asked for vectors, and how its answer is read."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dialect:
    """One endpoint's request and answer."""

    path: str
    body: Callable[[Sequence[str]], dict[str, Any]]
    vectors: Callable[[bytes], Vectors]
    """(texts, dimensions) in the texts' order, from the body of an answer."""


def tei(*, is_query: bool = False) -> Dialect:
    """text-embeddings-inference: POST /embed, answered with a bare list of lists of floats."""
    return Dialect(
        path="/embed",
        body=lambda texts: {"inputs": list(texts), "is_query": is_query},
        vectors=lambda answer: np.asarray(json.loads(answer), dtype=np.float32),
    )


def openai(path: str, model: str, **more: Any) -> Dialect:
    """OpenAI's embeddings, in base64: less to write and to read than decimal digits. `more` goes into each body."""
    return Dialect(
        path=path,
        body=lambda texts: {"input": list(texts), "model": model, "encoding_format": "base64", **more},
        vectors=_openai_vectors,
    )


def _openai_vectors(answer: bytes) -> Vectors:
    rows = sorted(json.loads(answer)["data"], key=lambda row: int(row["index"]))
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in rows])
