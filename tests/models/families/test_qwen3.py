"""Qwen3-Embedding equals the model card's code on a tiny checkpoint in the hub's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN, LoadedModel, load_model, run, text_tokenizer, unit
from tests.tiny_checkpoints import edit_json, plain_tokenizer
from vecmill.core.types import Task

FOLDER = GOLDEN / "qwen3" / "embedding"
TINY = (TinyModel(Task.EMBED, "qwen3", lambda folder: FOLDER, prefixes=True),)
REFERENCE = json.loads((GOLDEN / "qwen3" / "embedding_cases.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in REFERENCE["cases"]}
EXPECTED = load_file(GOLDEN / "qwen3" / "embedding_cases.safetensors")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(FOLDER)


@pytest.mark.parametrize("name", CASES)
async def test_texts_equal_the_card(loaded: LoadedModel, name: str) -> None:
    case = CASES[name]
    with text_tokenizer(loaded, case["max_length"]) as tokenizer:
        rows = [tokenized.row for tokenized in await tokenizer.encode(case["texts"], case["prompt"])]
    assert [row.token_ids.tolist() for row in rows] == case["ids"]
    np.testing.assert_allclose(unit(run(loaded[1], rows)), EXPECTED[f"{name}.embeddings"], atol=1e-5)


async def test_a_tokenizer_that_does_not_end_texts_is_taken_at_its_word(tmp_path: Path) -> None:
    """The first release's left the end token to the card's code; sentence-transformers adds none."""
    folder = shutil.copytree(FOLDER, tmp_path / "early")
    edit_json(
        folder / "tokenizer.json",
        post_processor={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    )
    case = CASES["documents"]
    own, early = plain_tokenizer(folder), load_model(folder)
    with text_tokenizer(early, case["max_length"]) as tokenizer:
        rows = [tokenized.row for tokenized in await tokenizer.encode(case["texts"])]
    expected = [own.encode(text).ids[: case["max_length"]] for text in case["texts"]]
    assert [row.token_ids.tolist() for row in rows] == expected


async def test_over_http_queries_documents_and_dimensions_equal_the_card(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "tiny")
    edit_json(folder / "config.json", is_matryoshka=True)
    queries, documents = CASES["queries"]["texts"], CASES["documents"]["texts"]
    async with serving(embed_model=str(folder)) as client:

        async def embed(texts: list[str], **fields: object) -> Any:
            answer = await client.post("/v1/embeddings", json={"input": texts, **fields})
            return np.array([entry["embedding"] for entry in answer.json()["data"]])

        wanted = EXPECTED["queries.embeddings"]
        np.testing.assert_allclose(await embed(queries, input_type="query"), wanted, atol=1e-5)
        np.testing.assert_allclose(await embed(documents), EXPECTED["documents.embeddings"], atol=1e-5)
        short = await embed(queries, input_type="query", dimensions=8)
        np.testing.assert_allclose(short, EXPECTED["queries.embeddings_dim8"], atol=1e-5)
        custom = await embed(CASES["custom_instruction"]["texts"], instruction="Find similar code")
        np.testing.assert_allclose(custom, EXPECTED["custom_instruction.embeddings"], atol=1e-5)


async def test_the_servers_instruction_replaces_the_default_one() -> None:
    case = CASES["custom_instruction"]
    async with serving(embed_model=str(FOLDER), query_instruction="Find similar code") as client:
        answer = await client.post("/embed", json={"inputs": case["texts"], "is_query": True})
    np.testing.assert_allclose(np.array(answer.json()), EXPECTED["custom_instruction.embeddings"], atol=1e-5)
