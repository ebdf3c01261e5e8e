"""Several models in one process: each by its names, each with what it can do."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import serving
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import edit_json, tiny_bert
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.engine.loader import Loaded, load

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NV_EMBED, QWEN3, RERANKER = (
    GOLDEN / "nvembed" / "checkpoint",
    GOLDEN / "qwen3" / "embedding",
    GOLDEN / "qwen3" / "reranker",
)
TEXTS = ["one text", "def add(a, b): return a + b"]


@pytest.fixture(scope="module")
async def several() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(
        embed_model=f"{NV_EMBED},{QWEN3},auto",
        rerank_model=f"{RERANKER},{GOLDEN / 'qwen3' / 'reranker_untied'}",
        model_aliases=f"text-embedding-3-small={MINILM},rerank-v3.5=reranker",
    ) as client:
        yield client


async def embed(client: httpx.AsyncClient, **fields: Any) -> Any:
    answer = await client.post("/v1/embeddings", json={"input": TEXTS, **fields})
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]]), answer.json()["model"]


async def test_each_model_answers_to_its_names(several: httpx.AsyncClient) -> None:
    for name, served, width in (
        (None, "checkpoint", 32),
        ("", "checkpoint", 32),
        ("checkpoint", "checkpoint", 32),
        ("embedding", "embedding", 32),
        (MINILM, MINILM, 384),
        ("text-embedding-3-small", MINILM, 384),
        ("text-embedding-3-small-query", MINILM, 384),
        ("embedding-passage", "embedding", 32),
    ):
        vectors, model = await embed(several, model=name)
        assert (model, vectors.shape) == (served, (2, width))
    for name, served in ((None, "reranker"), ("rerank-v3.5", "reranker"), ("reranker_untied", "reranker_untied")):
        answer = await several.post("/v1/rerank", json={"query": "a", "documents": TEXTS, "model": name})
        assert (answer.json()["model"], answer.json()["meta"]["method"]) == (served, "cross_encoder")
    by_cosine = await several.post("/v1/rerank", json={"query": "a", "documents": TEXTS, "model": MINILM})
    assert (by_cosine.json()["model"], by_cosine.json()["meta"]["method"]) == (MINILM, "cosine")


async def test_a_model_that_is_not_there_is_a_404_with_those_that_are(several: httpx.AsyncClient) -> None:
    for path, name, known in (
        ("/v1/embeddings", "nope", "checkpoint, embedding, sentence-transformers/all-MiniLM-L6-v2"),
        ("/v1/embeddings", "reranker", "embedding models are: checkpoint"),
        ("/v1/rerank", "nope", "rerankers are: reranker, rerank-v3.5, reranker_untied"),
    ):
        answer = await several.post(path, json={"input": "x", "query": "q", "documents": ["d"], "model": name})
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "model"
        assert known in answer.json()["error"]["message"]


async def test_models_side_by_side_equal_models_alone(several: httpx.AsyncClient) -> None:
    names = ["checkpoint", "embedding", MINILM] * 8
    together = await asyncio.gather(*(embed(several, model=name) for name in names))
    for folder, name in ((str(NV_EMBED), "checkpoint"), (str(QWEN3), "embedding"), ("auto", MINILM)):
        async with serving(embed_model=folder) as client:
            alone, _ = await embed(client)
        for vectors, model in together:
            if model == name:
                np.testing.assert_allclose(vectors, alone, atol=1e-5)


async def test_the_list_says_what_each_can_do(several: httpx.AsyncClient) -> None:
    listed = {model["id"]: model for model in (await several.get("/v1/models")).json()["data"]}
    assert list(listed) == ["checkpoint", "embedding", MINILM, "reranker", "reranker_untied"]
    for fields in listed.values():
        assert {"family", "dtype", "revision", "max_model_len", "prompts", "supported_dimensions"} <= set(fields)
    assert listed["checkpoint"]["prompts"]["query"].startswith("Instruct: Given a question")
    assert listed["embedding"]["supported_dimensions"] == {"min": 32, "max": 32}
    assert (listed[MINILM]["supported_dimensions"], listed[MINILM]["aliases"]) == ([384], ["text-embedding-3-small"])
    assert (listed["reranker"]["task"], listed["reranker"]["dimensions"]) == ("rerank", None)
    by_alias = (await several.get("/v1/models/text-embedding-3-small")).json()
    assert by_alias == listed[MINILM]
    health = (await several.get("/health")).json()
    assert health["models"] == {"embed": "checkpoint", "rerank": "reranker"}
    assert health["rerank_method"] == "cross_encoder"
    assert health["rerank_models"] == ["reranker", "reranker_untied"]


async def test_one_embedder_beside_a_reranker_answers_to_any_name() -> None:
    async with serving(embed_model=str(QWEN3), rerank_model=str(RERANKER)) as client:
        assert (await embed(client, model="nomic-embed"))[1] == "embedding"
        answer = await client.post("/v1/rerank", json={"query": "a", "documents": TEXTS, "model": "default"})
        assert answer.json()["model"] == "reranker"
    async with serving(embed_model=str(QWEN3), rerank_model=str(RERANKER), strict_model=True) as client:
        assert (await client.post("/v1/embeddings", json={"input": "x", "model": "nomic-embed"})).status_code == 404
        answer = await client.post("/v1/rerank", json={"query": "a", "documents": TEXTS, "model": "default"})
        assert answer.status_code == 404


def loaded(**flags: object) -> Loaded:
    settings = load_settings({"device": "cpu", "dtype": "float32", **flags})
    return load(settings.model, settings.engine, lambda percent, message: None)


def test_a_folder_named_twice_is_loaded_once(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_bert(tmp_path / "first", minilm_folder)
    (tmp_path / "second").symlink_to(folder)
    services = loaded(embed_model=f"{folder},{tmp_path / 'second'}", model_aliases="third=second,fourth=third")
    [model] = services.models.values()
    assert (model.card.id, model.card.aliases) == ("first", ("second", "third", "fourth"))


def test_a_backbone_that_embeds_and_reranks_is_loaded_once(tmp_path: Path) -> None:
    folder = shutil.copytree(RERANKER, tmp_path / "both")
    for name in ("modules.json", "chat_template.jinja"):
        (folder / name).unlink()
    edit_json(folder / "config.json", is_original_qwen3_reranker=True)
    embedder, reranker = loaded(embed_model=str(folder), rerank_model=str(folder)).models.values()
    assert embedder.model.modules[0] is reranker.model.modules[0]
    assert embedder.card.weight_bytes > 0
    assert reranker.card.weight_bytes == 0


def test_names_that_clash_stop_the_start(tmp_path: Path, minilm_folder: Path) -> None:
    first, second = (tiny_bert(tmp_path / parent / "model", minilm_folder, seed=len(parent)) for parent in ("a", "bb"))
    with pytest.raises(StartupError, match="two models would have this name"):
        loaded(embed_model=f"{first},{second}")
    with pytest.raises(StartupError, match=r"nope is not loaded; these are: model"):
        loaded(embed_model=str(first), model_aliases="a=nope")
    with pytest.raises(StartupError, match="own name"):
        loaded(embed_model=str(first), model_aliases="model=model")
