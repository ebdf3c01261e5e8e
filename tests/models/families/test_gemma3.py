"""Gemma 3's text model as an embedder: vectors equal those of sentence-transformers on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.variants import Variant, refusal, served
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import bfloat16_cosines
from tests.models.test_tolerances import COSINE_IN_BFLOAT16
from tests.oracle import st_encode
from tests.tiny_checkpoints import WINDOW, add_heads, edit_json, tiny_gemma3, write
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.engine.loader import load


def embedding_gemma(folder: Path, prompts: Mapping[str, str] | None = None) -> Path:
    """With the two dense layers, which have no bias and no activation."""
    tiny_gemma3(folder, prompts=prompts)
    plain = {"kind": "Dense", "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    sizes = ({"in_features": 32, "out_features": 128}, {"in_features": 128, "out_features": 32})
    return add_heads(folder, *({**plain, **each} for each in sizes), {"kind": "Normalize"})


TINY = (TinyModel(Task.EMBED, "gemma3_text", embedding_gemma, layer_kinds=2),)
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: ", "STS": "task: similarity | "}
TEXTS = [
    "one",
    "def add(a, b):\n    return a + b",
    "",
    "the thing " * WINDOW,
    "one",
    "naïve 你好 <bos>",
    "a longer text " * 40,
]


@pytest.mark.parametrize("both_ways", [True, False], ids=["EmbeddingGemma", "harrier"])
async def test_it_equals_sentence_transformers(tmp_path: Path, both_ways: bool) -> None:
    tiny = tmp_path / "tiny"
    folder = embedding_gemma(tiny, PROMPTS) if both_ways else tiny_gemma3(tiny, both_ways=False, prompts=PROMPTS)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"is_query": True}, PROMPTS["query"]),
        ({"is_query": False}, PROMPTS["document"]),
        ({"prompt_name": "STS"}, PROMPTS["STS"]),
    ]
    async with serving(embed_model=str(folder)) as client:
        for fields, prompt in cases:
            vectors = (await client.post("/embed", json={"inputs": TEXTS, **fields})).json()
            np.testing.assert_allclose(np.array(vectors), st_encode(folder, TEXTS, prompt=prompt), atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "layers-by-name": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "an-odd-window": {"sliding_window": 7},
    "a-window-of-one": {"sliding_window": 1},
    "one-way-in-a-window-of-one": {"sliding_window": 1, "use_bidirectional_attention": False},
    "no-window": {"sliding_window_pattern": 1},
    "older-bases": {"rope_parameters": None, "rope_theta": 5000.0, "rope_local_base_freq": 300.0},
    "older-scaling": {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "bases-by-layer": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
        }
    },
    "activation": {"hidden_activation": "silu", "hidden_act": "relu"},
    "its-hub-file": {"_sliding_window_pattern": 6, "final_logit_softcapping": 30.0},
    "a-language-model": {"architectures": ["Gemma3ForCausalLM"], "cache_implementation": "hybrid"},
}


def config(**changes: Any) -> Callable[[Path], None]:
    """Changes of config.json, with `layer_types` made of `sliding_window_pattern` unless it is among them; null takes a
    key away."""

    def change(folder: Path) -> None:
        own = json.loads((folder / "config.json").read_text("utf-8"))
        own |= {"layer_types": None, "sliding_window_pattern": 3, **changes}
        write(folder / "config.json", {key: value for key, value in own.items() if value is not None})

    return change


async def test_every_key_means_what_it_means_there(tmp_path: Path) -> None:
    variants = [Variant(name, tiny_gemma3, config(**changes), texts=TEXTS) for name, changes in WAYS.items()]
    async with served(variants, tmp_path) as server:
        for variant in variants:
            await server.assert_equal(variant)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping`: 50.0"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "`layer_types`"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "`rope_parameters.rope_theta`"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, '`rope_scaling.rope_type`: "dynamic"'),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
            "`rope_parameters.full_attention.rope_type`",
        ),
        ({"is_causal": False}, "`is_causal`"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "`architectures`"),
        ({"quantization_config": {"quant_method": "gptq"}}, "`quantization_config`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_gemma3(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder)


def test_float16_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_gemma3(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    settings = load_settings({"dtype": "float16", "embed_model": str(folder)})
    with pytest.raises(StartupError, match="range of float16: set DTYPE to auto, bfloat16 or float32"):
        load(settings.model, settings.engine, lambda percent, message: None)


async def test_a_published_models_card_gives_its_dimensions(tmp_path: Path) -> None:
    folder = tiny_gemma3(tmp_path / "embeddinggemma-300m", hidden_size=192)
    async with serving(embed_model=str(folder)) as client:
        [card] = (await client.get("/v1/models")).json()["data"]
        assert card["supported_dimensions"] == [128, 192]
        assert (card["prompts_from"], card["prompts"]["query"]) == ("card", PROMPTS["query"])


def test_in_bfloat16_vectors_point_the_same_way(tmp_path: Path) -> None:
    folder = embedding_gemma(tmp_path / "tiny")
    assert bfloat16_cosines(folder).min() >= COSINE_IN_BFLOAT16
