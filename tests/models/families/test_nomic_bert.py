"""nomic-embed-text equals transformers' own class on a tiny checkpoint in the hub's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import serving
from tests.models.families import TinyModel
from tests.oracle import nomic_encode
from tests.tiny_checkpoints import edit_json, tiny_nomic
from vecmill.core.types import Task
from vecmill.models.source import find

TINY = (TinyModel(Task.EMBED, "nomic_bert", lambda folder: tiny_nomic(folder, find("auto").folder)),)
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "one", "naïve 你好"]


@pytest.mark.parametrize("prompt", ["", "search_query: ", "search_document: ", "clustering: "])
async def test_nomic_equals_transformers(tmp_path: Path, minilm_folder: Path, prompt: str) -> None:
    folder = tiny_nomic(tmp_path / "nomic-embed-text-v1.5", minilm_folder)
    task = {"search_query: ": "search_query", "search_document: ": "search_document", "clustering: ": "clustering"}
    fields = {"input_type": task[prompt]} if prompt else {}
    async with serving(embed_model=str(folder)) as client:
        vectors = (await client.post("/embed", json={"inputs": TEXTS, **fields})).json()
    np.testing.assert_allclose(np.array(vectors), nomic_encode(folder, TEXTS, prompt=prompt), atol=1e-5)


async def test_nomics_fewer_dimensions_are_layer_normed_first(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_nomic(tmp_path / "nomic-embed-text-v1.5", minilm_folder)
    edit_json(folder / "config.json", matryoshka_dimensions=[8, 16])
    async with serving(embed_model=str(folder)) as client:
        [card] = (await client.get("/v1/models")).json()["data"]
        assert card["supported_dimensions"] == [8, 16, 32]
        for dimensions in (8, 16, 32, None):
            answer = await client.post("/embed", json={"inputs": TEXTS, "dimensions": dimensions})
            fewer = dimensions if dimensions != 32 else None
            wanted = nomic_encode(folder, TEXTS, dimensions=fewer, layer_norm=fewer is not None)
            np.testing.assert_allclose(np.array(answer.json()), wanted, atol=1e-5)
        refused = await client.post("/v1/embeddings", json={"input": "x", "dimensions": 9})
        assert refused.status_code == 400
        assert "8, 16, 32" in refused.json()["error"]["message"]
