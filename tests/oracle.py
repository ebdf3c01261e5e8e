"""sentence-transformers and transformers on the same files: what our numbers are held against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


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


@lru_cache(maxsize=4)
def _cross_encoder(folder: Path, max_length: int | None) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", max_length=max_length, activation_fn=torch.nn.Identity())


def cross_encoder_scores(
    folder: Path, query: str, documents: Sequence[str], max_length: int | None = None
) -> NDArray[np.float32]:
    """Raw logits in float32: (n,)."""
    pairs = [(query, document) for document in documents]
    scores: NDArray[np.float32] = _cross_encoder(folder, max_length).predict(pairs, show_progress_bar=False)
    return scores


@torch.inference_mode()
def mean_encode(folder: Path, texts: Sequence[str], max_length: int, **tokenizing: Any) -> NDArray[np.float32]:
    """Unit vectors in float32, (n, dimensions): the mean of what transformers' own model makes of each text alone."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt", **tokenizing)
        pooled = model(input_ids=tokens["input_ids"]).last_hidden_state[0].mean(dim=0)
        vectors.append(functional.normalize(pooled, dim=0))
    encoded: NDArray[np.float32] = torch.stack(vectors).numpy()
    return encoded


@lru_cache(maxsize=4)
def _nomic(folder: Path) -> tuple[Any, Any]:
    """The native model in float32, and its tokenizer.

    transformers does not read the hub's config keys, it would take its own defaults: they are translated here.
    """
    from transformers import AutoTokenizer, NomicBertConfig, NomicBertModel

    hub = json.loads((folder / "config.json").read_text("utf-8"))
    config = NomicBertConfig(
        vocab_size=hub["vocab_size"],
        hidden_size=hub["n_embd"],
        num_hidden_layers=hub["n_layer"],
        num_attention_heads=hub["n_head"],
        intermediate_size=hub["n_inner"],
        max_position_embeddings=hub["max_trained_positions"],
        type_vocab_size=hub["type_vocab_size"],
        layer_norm_eps=hub["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(hub["rotary_emb_base"])},
    )
    model, loading_info = NomicBertModel.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: names for kind, names in loading_info.items() if names}
    assert not wrong, wrong
    return model.eval(), AutoTokenizer.from_pretrained(folder, config=config)


@torch.inference_mode()
def nomic_encode(
    folder: Path,
    texts: Sequence[str],
    *,
    prompt: str = "",
    dimensions: int | None = None,
    layer_norm: bool = False,
    max_length: int | None = None,
) -> NDArray[np.float32]:
    """Unit vectors in float32, (n, dimensions): mean, `layer_norm` over the full width, slice, L2.

    A text is cut to `max_length` tokens: by default to the positions that the model was trained on.
    """
    model, tokenizer = _nomic(folder)
    vectors = []
    for text in texts:
        tokens = tokenizer(
            prompt + text,
            truncation=True,
            max_length=max_length or model.config.max_position_embeddings,
            return_tensors="pt",
        )
        pooled = model(**tokens).last_hidden_state[0].mean(dim=0)
        if layer_norm:
            pooled = functional.layer_norm(pooled, pooled.shape)
        vectors.append(functional.normalize(pooled[:dimensions], dim=0))
    encoded: NDArray[np.float32] = torch.stack(vectors).numpy()
    return encoded
