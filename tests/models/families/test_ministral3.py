"""Nemotron-3-Embed, a Ministral 3 that looks both ways: vectors equal those of sentence-transformers.

Nemotron-3.5-Rerank: scores equal those of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.checkpoints.variants import Variant, refusal, served
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import bfloat16_cosines
from tests.models.test_tolerances import COSINE_IN_BFLOAT16, OF_A_LOGIT
from tests.oracle import mean_encode, st_encode
from tests.tiny_checkpoints import (
    MINISTRAL3,
    SCALES_FROM,
    edit_json,
    tiny_ministral3,
    tiny_mistral3,
    tiny_nemotron_rerank,
)
from vecmill.core.types import Task


def without_modules(folder: Path) -> Path:
    """As the code of its own reads it: with the head beside the transformer's weights."""
    tiny_nemotron_rerank(folder)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    return folder


TINY = (
    TinyModel(Task.EMBED, "ministral3", tiny_ministral3),
    TinyModel(Task.EMBED, "mistral3", tiny_mistral3),
    TinyModel(Task.RERANK, "mistral3", without_modules),
    TinyModel(Task.RERANK, "mistral3", tiny_nemotron_rerank, layout="modules"),
)
PROMPTS = {"query": "query: ", "document": "passage: "}
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "the fox " * SCALES_FROM, "one", "naïve 你好 дела"]


async def test_it_equals_sentence_transformers(tmp_path: Path) -> None:
    folder = tiny_ministral3(tmp_path / "tiny", prompts=PROMPTS)
    async with serving(embed_model=str(folder)) as client:
        for is_query, prompt in ((None, ""), (True, "query: "), (False, "passage: ")):
            vectors = (await client.post("/embed", json={"inputs": TEXTS, "is_query": is_query})).json()
            np.testing.assert_allclose(np.array(vectors), st_encode(folder, TEXTS, prompt=prompt), atol=1e-5)


def config(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / "config.json", **changes)


ROPE: dict[str, Any] = MINISTRAL3["rope_parameters"]  # type: ignore[assignment]
WAYS: dict[str, dict[str, Any]] = {
    "one-way": {"is_causal": True},
    "one-way-in-a-window": {"sliding_window": 8, "is_causal": True},
    "scale": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.7}},
    "no-scale": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": 0}},
    "plain-positions": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
    "mscale": {"rope_parameters": {**ROPE, "mscale_all_dim": 0.5}},
    "activation": {"hidden_act": "gelu", "rms_norm_eps": 0.1},
    "a-language-model": {"architectures": ["Ministral3ForCausalLM"], "temperature": 0.5, "layer_types": None},
}


async def test_every_key_means_what_it_means_there(tmp_path: Path) -> None:
    variants = [Variant(name, tiny_ministral3, config(**changes), texts=TEXTS) for name, changes in WAYS.items()]
    async with served(variants, tmp_path) as server:
        for variant in variants:
            await server.assert_equal(variant)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_causal": None}, "`is_causal`: null"),
        ({"sliding_window": 8}, "null, where `is_causal` is false"),
        ({"pooling": "last"}, '`pooling`: "last"'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "with llama_4_scaling_beta and original"),
        ({"rope_parameters": {**ROPE, "llama_4_scaling_beta": "0.1"}}, "`rope_parameters.llama_4_scaling_beta`"),
        ({"rope_parameters": {**ROPE, "rope_type": "longrope"}}, "`rope_parameters.rope_type`"),
        ({"auto_map": {"AutoModel": "model.Ministral3BidirectionalModel"}}, "`auto_map`"),
        ({"architectures": ["Ministral3BidirectionalModel"]}, "`architectures`"),
        ({"attention_bias": False}, "`attention_bias`"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "`quantization_config`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = tiny_ministral3(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder)


async def test_the_card_gives_prompts_where_the_files_have_none(tmp_path: Path) -> None:
    folder = tiny_ministral3(tmp_path / "Nemotron-3-Embed-1B-BF16")
    async with serving(embed_model=str(folder)) as client:
        vectors = (await client.post("/embed", json={"inputs": TEXTS, "is_query": False})).json()
    np.testing.assert_allclose(np.array(vectors), st_encode(folder, TEXTS, prompt="passage: "), atol=1e-5)


def test_in_bfloat16_vectors_point_the_same_way(tmp_path: Path) -> None:
    assert bfloat16_cosines(tiny_ministral3(tmp_path / "tiny")).min() >= COSINE_IN_BFLOAT16


async def test_the_text_half_of_nemotron_3_5_equals_transformers(tmp_path: Path) -> None:
    """Its template puts a space between prompt and text, and special tokens of a text are none."""
    folder = tiny_mistral3(tmp_path / "tiny", prompts={"query": "query:", "document": "passage:"})
    async with serving(embed_model=str(folder)) as client:
        for is_query, prompt in ((None, ""), (True, "query: "), (False, "passage: ")):
            vectors = (await client.post("/embed", json={"inputs": TEXTS, "is_query": is_query})).json()
            wanted = mean_encode(folder, [prompt + text for text in TEXTS], 200, split_special_tokens=True)
            np.testing.assert_allclose(np.array(vectors), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m['content'][0]['text'] | trim }}{% endfor %}", "more than to put a prompt"),
        ("[INST]{{ messages[0]['content'][0]['text'] }}", "more than to put a prompt"),
        ("{{ bos_token }}", "uses bos_token"),
        ("{% for", "cannot be read"),
    ],
)
def test_a_template_that_does_more_to_texts_is_refused(tmp_path: Path, template: str, sentence: str) -> None:
    assert sentence in refusal(tiny_mistral3(tmp_path / "tiny", template=template))


@pytest.mark.parametrize("message", [False, [], "flat"])
def test_messages_that_are_no_object_are_refused(message: object, tmp_path: Path) -> None:
    folder = tiny_mistral3(tmp_path / "tiny")
    form = {"method": "forward", "method_output_name": "last_hidden_state"}
    edit_json(folder / "sentence_bert_config.json", modality_config={"text": form, "message": message})
    assert "`modality_config`" in refusal(folder)


def test_messages_without_a_processor_are_refused(tmp_path: Path) -> None:
    """Then sentence-transformers would put no special tokens around them."""
    folder = tiny_mistral3(tmp_path / "tiny")
    (folder / "processor_config.json").unlink()
    assert "has no processor_config.json" in refusal(folder)


def test_of_a_text_half_other_models_are_refused(tmp_path: Path) -> None:
    folder = tiny_mistral3(tmp_path / "tiny")
    edit_json(folder / "config.json", text_config={"model_type": "mistral", "hidden_size": 32})
    assert "`text_config.model_type`" in refusal(folder)


QUERY = "How do I add?"
DOCUMENTS = ["one", "def add(a, b):\n    return a + b", "", "the fox " * SCALES_FROM, "naïve 你好 дела"]


@torch.inference_mode()
def rerank_logits(folder: Path, query: str) -> NDArray[np.float32]:
    """The published code's arithmetic: the mean of a pair's hidden states, the linear layer, the temperature."""
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    head = load_file(folder / "model.safetensors")["language_model.score.weight"][0]
    logits = []
    for document in DOCUMENTS:
        text = f"question: {query}\n \npassage: {document}"
        tokens = tokenizer(text, add_special_tokens=False, truncation=True, max_length=200, return_tensors="pt")
        hidden = model(input_ids=tokens["input_ids"]).last_hidden_state[0]
        logits.append(float(hidden.mean(dim=0) @ head) / 0.5)
    return np.array(logits, dtype=np.float32)


async def rerank_scores(folders: list[Path], query: str) -> list[NDArray[np.float32]]:
    scores = []
    names = ",".join(map(str, folders))
    async with serving(rerank_model=names, max_model_len=200, max_batch_tokens=256) as client:
        for folder in folders:
            body = {"model": folder.name, "query": query, "texts": DOCUMENTS, "raw_scores": True}
            answer = await client.post("/rerank", json=body)
            assert answer.is_success, answer.text
            in_order = sorted(answer.json(), key=lambda result: int(result["index"]))
            scores.append(np.array([result["score"] for result in in_order], dtype=np.float32))
    return scores


async def test_nemotron_3_5_rerank_scores_the_mean_in_both_of_its_layouts(tmp_path: Path) -> None:
    folders = [tiny_nemotron_rerank(tmp_path / "modules"), without_modules(tmp_path / "head")]
    wanted = rerank_logits(folders[0], QUERY)
    assert wanted.std() > 0.1
    for scores in await rerank_scores(folders, QUERY):
        np.testing.assert_allclose(scores, wanted, atol=OF_A_LOGIT, rtol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auto_map": {"AutoModel": "model.Other"}}, "`auto_map`"),
        ({"is_causal": True}, "as `text_config` has it"),
        ({"id2label": {"0": "no", "1": "yes"}}, "a reranker has one"),
        ({"score_temperature": 0}, "`score_temperature`: 0"),
        ({"pooling": None}, "`pooling`: null"),
    ],
)
def test_of_a_nemotron_reranker_others_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = without_modules(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder, rerank=True)
    assert "this is a reranker" in refusal(folder)
