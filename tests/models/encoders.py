"""What is asked of every encoder: the numbers of sentence-transformers, in float32 and, near enough, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import load_model, run, unit
from tests.models.test_tolerances import COSINE_IN_BFLOAT16, OF_A_VALUE, RELEVANCE_IN_BFLOAT16
from tests.oracle import cross_encoder_scores, st_encode
from tests.tiny_checkpoints import edit_json
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.checkpoint import Source, read

TEXTS = [
    *("one", "def add(a, b):\n    return a + b", "", "a longer text " * 60, "one", " one"),
    "naïve 你好 ÉCOLE <s> <pad> [MASK] дела",
]
QUERIES = ["How many people live in Berlin?", "a query that is too long by itself " * 12]
DOCUMENTS = ["yes", "", "Berlin has 3.5 million inhabitants.", "a much longer document " * 40, "naïve 你好", "yes"]
MAX_LENGTH = 100


async def assert_equal_to_sentence_transformers(embedders: Sequence[Path], rerankers: Sequence[Path]) -> None:
    """Vectors and raw scores of one server that has them all."""
    named = {
        "embed_model": ",".join(map(str, embedders)) or "auto",
        "rerank_model": ",".join(map(str, rerankers)) or "none",
    }
    async with serving(**named) as client:
        for folder in embedders:
            answer = await client.post("/v1/embeddings", json={"model": folder.name, "input": TEXTS})
            assert answer.is_success, answer.text
            vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
            np.testing.assert_allclose(vectors, st_encode(folder, TEXTS), atol=OF_A_VALUE, rtol=0, err_msg=folder.name)
        for folder, query in ((folder, query) for folder in rerankers for query in QUERIES):
            body = {"model": folder.name, "query": query, "documents": DOCUMENTS, "raw_scores": True}
            answer = await client.post("/v1/rerank", json=body)
            assert answer.is_success, answer.text
            scores = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
            wanted = cross_encoder_scores(folder, query, DOCUMENTS, max_length=MAX_LENGTH)
            assert np.ptp(wanted) > 0.1
            measured = [scores[index] for index in range(len(DOCUMENTS))]
            np.testing.assert_allclose(measured, wanted, atol=OF_A_VALUE, rtol=OF_A_VALUE, err_msg=folder.name)


def assert_near_in_bfloat16(tiny: TinyModel, folder: Path) -> None:
    """As docs/models.md states it."""
    random = np.random.default_rng(0)
    exact = load_model(folder, tiny.task)[1]
    rows = [tiny.row(length, exact.vocab_size, random) for length in (3, 10, 10, 33, 90)]
    wanted, rounded = (run(model, rows) for model in (exact, load_model(folder, tiny.task, torch.bfloat16)[1]))
    if tiny.task is Task.EMBED:
        assert (unit(wanted) * unit(rounded)).sum(axis=1).min() >= COSINE_IN_BFLOAT16
    else:
        relevance, of_rounded = (1 / (1 + np.exp(-logits)) for logits in (wanted, rounded))
        np.testing.assert_allclose(of_rounded, relevance, atol=RELEVANCE_IN_BFLOAT16)


def assert_weights_of_pretraining_load(folder: Path, prefix: str, others: Sequence[str]) -> None:
    """An embedder whose files were saved with the head of its pre-training, under a prefix, gives the same vectors."""
    model = load_model(folder)[1]
    rows = [TinyModel(Task.EMBED, "", Path).row(20, model.vocab_size, np.random.default_rng(0))]
    wanted = run(model, rows)
    weights = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights |= {name: torch.ones(2) for name in others}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(run(load_model(folder)[1], rows), wanted)


def refusal(write: Callable[[], Path], task: Task, **keys: Any) -> str:
    """What a changed config.json is refused with, before weights are read."""
    folder = write()
    edit_json(folder / "config.json", **keys)
    try:
        read(Source(folder.name, folder, task))
    except StartupError as error:
        return error.message
    raise AssertionError(f"{keys} is served")
