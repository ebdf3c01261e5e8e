"""Qwen2 as an embedder, one way (jina-code-embeddings) and both ways (gte-Qwen2): equal to sentence-transformers."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen2Config

from tests.checkpoints import variants
from tests.checkpoints.variants import Served, Variant, reference_vectors, refusal, served, unchanged
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import around_texts, edit_json, tiny_decoder
from vecmill.core.types import Task
from vecmill.models.families import published_model

TOKENIZER = GOLDEN / "qwen3" / "reranker"  # whose template adds nothing
DYNAMIC = {"type": "dynamic", "factor": 4.0}
CODE = {"AutoModel": "modeling_qwen.Qwen2Model", "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]}


def tiny_qwen2(folder: Path, **options: Any) -> Path:
    """Two layers of 32 dimensions, with Qwen's tokenizer, and biases in its attention as every Qwen2."""
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return tiny_decoder(folder, config, TOKENIZER, **{"eos_token": "<|endoftext|>", **options})


TINY = (TinyModel(Task.EMBED, "qwen2", tiny_qwen2, prefixes=True),)


def gte(folder: Path) -> None:
    """As Alibaba-NLP/gte-Qwen2-1.5B-instruct lies on the hub: the files name code of their own."""
    edit_json(
        folder / "config.json",
        architectures=["Qwen2ForCausalLM"],
        auto_map=CODE,
        is_causal=False,
        max_window_layers=1,
        sliding_window=128,
        use_sliding_window=False,
        rope_theta=1000000.0,
        rope_parameters=None,
    )
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", auto_map=TOKENIZER_CODE)


def ends(folder: Path) -> None:
    """As gte-Qwen2's: the template of tokenizer.json has nothing of it."""
    gte(folder)
    edit_json(folder / "tokenizer_config.json", add_eos_token=True)


def config(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tiny_mean(folder: Path) -> Path:
    return tiny_qwen2(folder, pooling="mean_tokens")


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}
ENDING = Variant("ends-with-a-token", tiny_qwen2, ends)
TEXTS = tuple(filter(None, variants.TEXTS))  # its tokenizer makes nothing of an empty text
VARIANTS = [
    Variant("one-way", tiny_qwen2, unchanged, texts=TEXTS),
    Variant("gte", tiny_qwen2, gte, texts=TEXTS),
    Variant("both-ways", tiny_qwen2, config(is_causal=False), texts=TEXTS),
    Variant("both-ways-mean", tiny_mean, config(is_causal=False), texts=TEXTS),
    Variant("mean", tiny_mean, unchanged, texts=TEXTS),
    Variant("window", tiny_qwen2, config(**SLIDING), texts=TEXTS),
    Variant("activation", tiny_qwen2, config(hidden_act="gelu", rms_norm_eps=0.1), texts=TEXTS),
    Variant("dynamic", tiny_qwen2, config(rope_parameters=None, rope_theta=1e4, rope_scaling=DYNAMIC), texts=TEXTS),
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served([*VARIANTS, ENDING], tmp_path_factory.mktemp("qwen2")) as server:
        yield server


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


async def test_texts_end_as_the_tokenizers_file_says(server: Served, tmp_path: Path) -> None:
    """transformers 5 does not read `add_eos_token`: the reference has the same in its template."""
    folder = shutil.copytree(server.folders["one-way"], tmp_path / "reference")
    edit_json(folder / "config.json", is_causal=False)
    around_texts(folder, last="<|endoftext|>")
    vectors = await server.vectors(ENDING)
    np.testing.assert_allclose(vectors, reference_vectors(folder, ENDING.texts), atol=1e-5)


def test_each_mask_and_pooling_gives_other_vectors(server: Served) -> None:
    """Were the references alike, their equality would show nothing."""
    texts = ("How do I parse dates in Python?",)
    names = ("one-way", "both-ways", "mean", "both-ways-mean", "window")
    vectors = [reference_vectors(server.folders[name], texts)[0] for name in names]
    similar = np.array(vectors) @ np.array(vectors).T - 2 * np.eye(len(names))
    assert similar.max() < 0.999


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_causal": None}, "`is_causal`: null"),
        ({"auto_map": CODE}, "`is_causal`"),
        ({"auto_map": {"AutoModel": "modeling.Qwen2Model"}, "is_causal": False}, "`auto_map`"),
        ({**SLIDING, "is_causal": False}, "false, where `is_causal` is false"),
        ({"layer_types": ["sliding_attention"] * 2}, "`use_sliding_window`"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "`architectures`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_qwen2(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder)


def test_a_tokenizers_code_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path / "tiny", auto_map={"AutoTokenizer": ["tokenization.Own", None]})
    assert "`auto_map`" in refusal(folder)


def test_the_card_has_the_prompt_with_a_space() -> None:
    card = published_model("Alibaba-NLP/gte-Qwen2-7B-instruct")
    assert card is not None
    assert card.prompts["query"].endswith("answer the query\nQuery: ")
