"""BERT and XLM-R: vectors and scores equal those of sentence-transformers on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import serving
from tests.models.families import TinyModel
from tests.oracle import cross_encoder_scores, st_encode
from tests.tiny_checkpoints import add_heads, tiny_bert, tiny_cross_encoder, tiny_xlm_roberta
from vecmill.core.types import Task
from vecmill.models.source import find


def cross_encoder(folder: Path) -> Path:
    return tiny_cross_encoder(folder, kind="bert", tokenizer_from=find("auto").folder)


def with_heads(folder: Path) -> Path:
    """As LaBSE, with more modules than it has."""
    dense = {"kind": "Dense", "in_features": 32, "out_features": 16}
    return add_heads(tiny_bert(folder, find("auto").folder), dense, {"kind": "LayerNorm", "dimension": 16})


TINY = (
    TinyModel(Task.EMBED, "bert", lambda folder: tiny_bert(folder, find("auto").folder)),
    TinyModel(Task.EMBED, "bert", with_heads, layout="heads"),
    TinyModel(Task.RERANK, "bert", cross_encoder, second_text=True),
)
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "one", "naïve 你好"]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
async def test_each_pooling_equals_sentence_transformers(
    tmp_path: Path, minilm_folder: Path, kind: str, pooling: str
) -> None:
    if kind == "bert":
        folder = tiny_bert(tmp_path / "tiny", minilm_folder, pooling=pooling)
    else:
        folder = tiny_xlm_roberta(tmp_path / "tiny", pooling=pooling)
    async with serving(embed_model=str(folder)) as client:
        vectors = (await client.post("/embed", json={"inputs": TEXTS})).json()
    np.testing.assert_allclose(np.array(vectors), st_encode(folder, TEXTS), atol=1e-5)


async def test_the_models_own_prompts_are_applied_by_role_and_by_name(tmp_path: Path, minilm_folder: Path) -> None:
    prompts = {"query": "search_query: ", "passage": "search_document: ", "sts": "compare: "}
    folder = tiny_bert(tmp_path / "tiny", minilm_folder, prompts=prompts)
    async with serving(embed_model=str(folder)) as client:

        async def embed(text: str, **fields: Any) -> NDArray[np.float32]:
            answer = await client.post("/embed", json={"inputs": text, **fields})
            return np.array(answer.json()[0], dtype=np.float32)

        cases: list[tuple[dict[str, Any], str]] = [
            ({"is_query": True}, "search_query: "),
            ({"is_query": False}, "search_document: "),
            ({"prompt_name": "sts"}, "compare: "),
            ({}, ""),
        ]
        for fields, prompt in cases:
            wanted = st_encode(folder, ["a text"], prompt=prompt)[0]
            np.testing.assert_allclose(await embed("a text", **fields), wanted, atol=1e-5)
        prefixed = await embed("search_query: a text", is_query=True)
        np.testing.assert_allclose(prefixed, await embed("a text", is_query=True), atol=1e-6)
        unknown = await client.post("/embed", json={"inputs": "x", "prompt_name": "nope"})
        assert "passage, query, sts" in unknown.json()["error"]


PAIRS = ["yes", "", "Berlin has 3.5 million inhabitants.", "a much longer document " * 20, "naïve 你好", "yes"]
QUERIES = ["How many people live in Berlin?", "", "a query that is too long by itself " * 8]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
async def test_cross_encoders_equal_sentence_transformers(
    tmp_path: Path, minilm_folder: Path, kind: Literal["bert", "xlm-roberta"]
) -> None:
    folder = tiny_cross_encoder(tmp_path / "tiny", kind=kind, tokenizer_from=minilm_folder, max_length=64)
    async with serving(rerank_model=str(folder)) as client:
        for query in QUERIES:
            body = {"query": query, "documents": PAIRS, "raw_scores": True}
            answer = (await client.post("/v1/rerank", json=body)).json()
            by_index = {result["index"]: result["relevance_score"] for result in answer["results"]}
            wanted = cross_encoder_scores(folder, query, PAIRS, max_length=64)
            np.testing.assert_allclose([by_index[index] for index in range(len(PAIRS))], wanted, atol=1e-5)
            scaled = (await client.post("/rerank", json={**body, "raw_scores": False})).json()["results"]
            relevance = {result["index"]: result["relevance_score"] for result in scaled}
            np.testing.assert_allclose(
                [relevance[index] for index in range(len(PAIRS))], 1 / (1 + np.exp(-wanted)), atol=1e-5
            )
        refused = await client.post("/v1/rerank", json={"query": "a", "documents": ["b"], "instruction": "Find code"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "instruction")
