"""What is asked and what is answered, free of any wire dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]  # (n_tokens,)
Vector = NDArray[np.float32]  # (dimensions,)
Matrix = NDArray[np.float32]  # (n_inputs, dimensions)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a loaded model is; reported by /v1/models, /health and the start log."""

    id: str
    family: str
    revision: str
    """Commit of the hub snapshot, else the SHA-256 of the weights' index (first 12 hex digits)."""
    dimensions: int
    max_model_len: int
    """Tokens per input, special tokens included."""
    vocab_size: int
    """Rows of the token embedding; every token id must be below it."""
    pooling: str
    dtype: str
    dtype_reason: str
    device: str
    weight_bytes: int
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one request spent in each stage.

    `queue` ends when its first batch starts; `infer` is from there to the end of its last batch.
    """

    tokenize: float
    queue: float
    infer: float


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts, or ready token ids of the model's own vocabulary, to be turned into vectors."""

    inputs: Sequence[str] | Sequence[Sequence[int]]
    model: str | None = None
    prompt_name: str | None = None
    is_query: bool | None = None
    """None: as it is, without a prompt."""
    truncate: bool | None = None
    """None leaves it to AUTO_TRUNCATE."""
    dimensions: int | None = None
    normalize: bool = True
    param: str = "input"
    """What this dialect calls the inputs, for error texts."""


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """Vectors in input order."""

    embeddings: Matrix
    model: str
    prompt_tokens: int
    truncated: tuple[int, ...]
    """Indexes of the inputs that were cut to the model's maximum length."""
    timings: Timings


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A query and the documents to score against it."""

    query: str
    documents: Sequence[str]
    model: str | None = None
    truncate: bool | None = None
    raw_scores: bool = False
    param: str = "documents"


@dataclass(frozen=True, slots=True)
class RerankResult:
    """Scores in the documents' order: in 0..1, or the model's own scale where raw scores were asked for."""

    scores: Vector
    model: str
    method: str
    """`cosine`: an embedding model ranked; `cross_encoder`: a reranker did."""
    prompt_tokens: int
    truncated: tuple[int, ...]
    timings: Timings
