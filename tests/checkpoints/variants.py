"""A table of variants of tiny checkpoints, each of which is either served or refused.

A variant is a base, as a function that writes a folder, and a change to its files. It is either refused at the start
with a sentence, or its vectors and scores equal those of sentence-transformers on the same folder. All variants of a
table that are served are loaded by one server.
"""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from tests.conftest import serving
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import tiny_bert, tiny_xlm_roberta
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.engine.loader import load
from vecmill.models.source import find

TEXTS = (
    "one",
    "",
    "How do I parse dates in Python?",
    "def add(first, second):\n    return first + second",
    "naïve 你好 ÉCOLE <s> <pad> [MASK] дела",
    "a longer text " * 60,
)
QUERY = "How do I parse dates?"
DOCUMENTS = ("one", "Plants create oxygen.", "naïve 你好 ÉCOLE <s> <pad> [MASK]", "a longer text " * 60)
TOLERANCE = 1e-5


def unchanged(folder: Path) -> None:
    """Leave the base unchanged."""


def bert(folder: Path) -> None:
    """A tiny BERT with the bundled model's tokenizer."""
    tiny_bert(folder, find("auto").folder)


def xlm_roberta(folder: Path) -> None:
    """A tiny XLM-RoBERTa."""
    tiny_xlm_roberta(folder)


def qwen3(folder: Path) -> None:
    """A tiny Qwen3-Embedding, with the hub's files."""
    shutil.copytree(GOLDEN / "qwen3" / "embedding", folder, dirs_exist_ok=True)


@dataclass(frozen=True)
class Variant:
    """One row of a table."""

    name: str
    """Also the folder's."""
    base: Callable[[Path], Any]
    """Writes a checkpoint into the folder."""
    change: Callable[[Path], Any] = unchanged
    refused: str | None = None
    """A part of the sentence that the server ends with; None: it is served, and equals the reference."""
    rerank: bool = False
    texts: Sequence[str] = field(default=TEXTS)
    documents: Sequence[str] = field(default=DOCUMENTS)

    def write(self, root: Path) -> Path:
        """Its folder below `root`."""
        folder = root / self.name
        folder.mkdir(parents=True)
        self.base(folder)
        self.change(folder)
        return folder

    def assert_refused(self, root: Path) -> None:
        """The server ends with the sentence."""
        assert self.refused is not None
        assert self.refused in refusal(self.write(root), rerank=self.rerank)

    def __str__(self) -> str:
        return self.name


def refusal(folder: Path, *, rerank: bool = False) -> str:
    """What the server says at its start about a folder; AssertionError where it would serve it."""
    models: dict[str, object] = (
        {"embed_model": "auto", "rerank_model": str(folder)} if rerank else {"embed_model": str(folder)}
    )
    settings = load_settings({"dtype": "float32", "device": "cpu", "max_batch_tokens": 512, **models})
    try:
        load(settings.model, settings.engine, lambda percent, message: None)
    except StartupError as error:
        return error.message
    raise AssertionError(f"{folder.name} is served")


@asynccontextmanager
async def served(variants: Sequence[Variant], root: Path, **flags: object) -> AsyncIterator[Served]:
    """One server with all variants of a table that are not refused."""
    folders = {variant.name: variant.write(root) for variant in variants if variant.refused is None}
    embedders = [str(folders[variant.name]) for variant in variants if variant.refused is None and not variant.rerank]
    rerankers = [str(folders[variant.name]) for variant in variants if variant.refused is None and variant.rerank]
    # What warm-up measures is of no use here, and every model is warmed up.
    models: dict[str, object] = {"embed_model": ",".join(embedders) or "auto", "max_batch_tokens": 64, **flags}
    if rerankers:
        models["rerank_model"] = ",".join(rerankers)
    # The reference obeys control tokens in documents.
    async with serving(allow_control_tokens=True, **models) as client:
        yield Served(client, folders)


@dataclass(frozen=True)
class Served:
    """A server with variants, and their folders by name."""

    client: httpx.AsyncClient
    folders: dict[str, Path]

    async def vectors(self, variant: Variant, **fields: object) -> NDArray[np.float32]:
        """(n, dimensions) as the server gives them."""
        body = {"model": variant.name, "input": list(variant.texts), **fields}
        answer = await self.client.post("/v1/embeddings", json=body)
        assert answer.is_success, answer.text
        return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)

    async def logits(self, variant: Variant) -> NDArray[np.float32]:
        """(n,) raw scores of QUERY with the documents, in their order."""
        body = {"model": variant.name, "query": QUERY, "texts": list(variant.documents), "raw_scores": True}
        answer = await self.client.post("/rerank", json=body)
        assert answer.is_success, answer.text
        in_order = sorted(answer.json(), key=lambda result: int(result["index"]))
        return np.array([result["score"] for result in in_order], dtype=np.float32)

    async def assert_equal(self, variant: Variant) -> None:
        """The server's numbers are the reference's."""
        folder = self.folders[variant.name]
        if variant.rerank:
            measured = await self.logits(variant)
            expected = await asyncio.to_thread(reference_logits, folder, variant.documents)
        else:
            measured = await self.vectors(variant)
            expected = await asyncio.to_thread(reference_vectors, folder, variant.texts)
        np.testing.assert_allclose(measured, expected, atol=TOLERANCE, rtol=0)


def reference_vectors(folder: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """What sentence-transformers' `encode` gives, normalised as the server's answers are."""
    from sentence_transformers import SentenceTransformer  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
        encoded: NDArray[np.float32] = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return encoded


def reference_logits(folder: Path, documents: Sequence[str] = DOCUMENTS, query: str = QUERY) -> NDArray[np.float32]:
    """What sentence-transformers' `predict` gives before any activation."""
    import torch
    from sentence_transformers import CrossEncoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
        pairs = [(query, document) for document in documents]
        scores: NDArray[np.float32] = model.predict(
            pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False, batch_size=1
        )
    return scores
