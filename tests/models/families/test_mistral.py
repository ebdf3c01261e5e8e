"""Mistral as an embedder (e5-mistral, SFR, Linq): window, end token and prompts as in sentence-transformers."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MistralConfig

from tests.checkpoints.variants import Served, Variant, reference_vectors, refusal, served
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN, load_model, text_tokenizer
from tests.oracle import st_encode
from tests.tiny_checkpoints import around_texts, edit_json, tiny_decoder
from vecmill.core.types import Task

LLAMA2_TOKENIZER = GOLDEN / "nvembed" / "checkpoint"
WEB = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
FILES_PROMPTS = {"web_search_query": WEB, "sts_query": "Instruct: Retrieve semantically similar text\nQuery: "}


def tiny_mistral(folder: Path, **options: Any) -> Path:
    """Two layers of 32 dimensions with a window of 8 tokens, and Llama 2's kind of tokenizer."""
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return tiny_decoder(folder, config, LLAMA2_TOKENIZER, **options)


TINY = (TinyModel(Task.EMBED, "mistral", tiny_mistral, prefixes=True),)


def config(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tiny_e5(folder: Path) -> Path:
    """The hub's: tokenizer_config.json ends texts, and the template of tokenizer.json only begins them."""
    return tiny_mistral(folder, add_eos_token=True)


ENDING = Variant("ends-with-a-token", tiny_e5)
VARIANTS = [
    Variant("window", tiny_mistral),
    Variant("no-window", tiny_mistral, config(sliding_window=None)),
    Variant("wide-window", tiny_mistral, config(sliding_window=4096)),
    Variant("mean", lambda folder: tiny_mistral(folder, pooling="mean_tokens")),
    Variant("head-dim", lambda folder: tiny_mistral(folder), config(architectures=["MistralForCausalLM"], head_dim=8)),
    Variant("theta", tiny_mistral, config(rope_parameters=None, rope_theta=7.0, rope_scaling=None, hidden_act="gelu")),
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served([*VARIANTS, ENDING], tmp_path_factory.mktemp("mistral")) as server:
        yield server


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


async def test_texts_end_as_the_tokenizers_file_says(server: Served, tmp_path: Path) -> None:
    """transformers 5 does not read `add_eos_token`: the reference has the same in its template."""
    folder = shutil.copytree(server.folders["window"], tmp_path / "reference")
    around_texts(folder, first="<s>", last="</s>")
    vectors = await server.vectors(ENDING)
    np.testing.assert_allclose(vectors, reference_vectors(folder, ENDING.texts), atol=1e-5)
    templated = shutil.copytree(folder, tmp_path / "both")  # not twice
    edit_json(templated / "tokenizer_config.json", add_eos_token=True)
    loaded = load_model(templated)
    with text_tokenizer(loaded, 128) as tokenizer:
        [one] = await tokenizer.encode(["one"])
    assert one.row.token_ids.tolist().count(2) == 1


def test_each_window_and_pooling_gives_other_vectors(server: Served) -> None:
    """Were the references alike, their equality would show nothing."""
    texts = ("a longer text " * 12,)
    names = ("window", "no-window", "mean")
    vectors = [reference_vectors(server.folders[name], texts)[0] for name in names]
    similar = np.array(vectors) @ np.array(vectors).T - 2 * np.eye(len(names))
    assert similar.max() < 0.999


async def test_a_query_has_the_cards_prompt_where_the_files_name_only_tasks(tmp_path: Path) -> None:
    folder = tiny_mistral(tmp_path / "e5-mistral-7b-instruct", prompts=FILES_PROMPTS)
    linq = tiny_mistral(tmp_path / "Linq-Embed-Mistral")
    texts = ["summit define", "one"]
    async with serving(embed_model=f"{folder},{linq}") as client:
        for fields, prompt in (
            ({"input_type": "query"}, WEB),
            ({"input_type": "document"}, ""),
            ({}, ""),
            ({"prompt_name": "sts_query"}, FILES_PROMPTS["sts_query"]),
            ({"instruction": "Find code"}, "Instruct: Find code\nQuery: "),
        ):
            answer = await client.post("/v1/embeddings", json={"input": texts, "model": folder.name, **fields})
            vectors = [row["embedding"] for row in answer.json()["data"]]
            np.testing.assert_allclose(np.array(vectors), st_encode(folder, texts, prompt=prompt), atol=1e-5)
        models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
    assert set(models[folder.name]["prompts"]) == {"query", "document", *FILES_PROMPTS}
    assert "retrieve Wikipedia passages" in models[linq.name]["prompts"]["query"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_causal": False}, "`is_causal`: false"),
        ({"layer_types": ["full_attention"] * 2}, "`layer_types`"),
        ({"sliding_window": 0}, "`sliding_window`: 0"),
        ({"auto_map": {"AutoModel": "modeling.MistralModel"}}, "`auto_map`"),
        ({"architectures": ["MixtralForCausalLM"]}, "`architectures`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_mistral(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder)
