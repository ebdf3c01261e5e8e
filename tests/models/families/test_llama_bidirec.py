"""llama-nemotron equals transformers' LlamaModel looking both ways, on tiny checkpoints in the hub's layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.checkpoints.variants import refusal
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN, bfloat16_cosines
from tests.models.test_tolerances import COSINE_IN_BFLOAT16, RELEVANCE_IN_BFLOAT16
from tests.oracle import st_encode
from tests.tiny_checkpoints import edit_json, tiny_llama_bidirec, write
from vecmill.core.types import Task

TOKENIZER = GOLDEN / "qwen3" / "reranker"


def embedder(folder: Path) -> Path:
    return tiny_llama_bidirec(folder, TOKENIZER)


def reranker(folder: Path) -> Path:
    return tiny_llama_bidirec(folder, TOKENIZER, reranker=True)


TINY = (TinyModel(Task.EMBED, "llama_bidirec", embedder), TinyModel(Task.RERANK, "llama_bidirec", reranker))
TEXTS = ["one", "def add(a, b):\n    return a + b", "", "a longer text " * 40, "one", "naïve 你好"]
PROMPTS = {"query": "query: ", "document": "passage: "}


def native(folder: Path, copy: Path) -> Path:
    """The same checkpoint as transformers reads it without the hub's code."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    own = ("auto_map", "pooling", "temperature", "rope_parameters")
    kept = {key: value for key, value in config.items() if key not in own}
    write(copy / "config.json", {**kept, "model_type": "llama", "architectures": ["LlamaModel"], "is_causal": False})
    return copy


async def test_embeddings_equal_llama_looking_both_ways(tmp_path: Path) -> None:
    folder = tiny_llama_bidirec(tmp_path / "tiny", TOKENIZER, prompts=PROMPTS)
    reference = native(folder, tmp_path / "native")
    async with serving(embed_model=str(folder)) as client:
        for is_query, prompt in ((None, ""), (True, "query: "), (False, "passage: ")):
            vectors = (await client.post("/embed", json={"inputs": TEXTS, "is_query": is_query})).json()
            np.testing.assert_allclose(np.array(vectors), st_encode(reference, TEXTS, prompt=prompt), atol=1e-5)


@torch.inference_mode()
def logits(folder: Path, copy: Path, query: str, documents: Sequence[str]) -> NDArray[np.float32]:
    """The card's recipe: its template, the mean of the last hidden states, the linear layer, the temperature."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(native(folder, copy), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    score = load_file(folder / "model.safetensors")["score.weight"]
    scores = []
    for document in documents:
        text = f"question:{query} \n \n passage:{document}"
        tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        scores.append(float(model(**tokens).last_hidden_state[0].mean(dim=0) @ score[0]) / 0.5)
    return np.array(scores, dtype=np.float32)


async def scores(folder: Path, query: str, **flags: Any) -> NDArray[np.float32]:
    async with serving(rerank_model=str(folder), **flags) as client:
        answer = await client.post("/rerank", json={"query": query, "texts": TEXTS, "raw_scores": True})
        assert answer.is_success, answer.text
        refused = await client.post("/v1/rerank", json={"query": "a", "documents": ["b"], "instruction": "Find code"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "instruction")
    in_order = sorted(answer.json(), key=lambda result: int(result["index"]))
    return np.array([result["score"] for result in in_order], dtype=np.float32)


@pytest.mark.parametrize("query", ["How do I add?", "  two spaces\n"])
async def test_scores_equal_the_mean_and_a_linear_layer(tmp_path: Path, query: str) -> None:
    folder = reranker(tmp_path / "tiny")
    wanted = logits(folder, tmp_path / "native", query, TEXTS)
    np.testing.assert_allclose(await scores(folder, query), wanted, atol=1e-4)


async def test_in_bfloat16(tmp_path: Path) -> None:
    assert bfloat16_cosines(embedder(tmp_path / "tiny")).min() >= COSINE_IN_BFLOAT16
    exact, rounded = [await scores(reranker(tmp_path / dtype), "add", dtype=dtype) for dtype in ("float32", "bfloat16")]
    np.testing.assert_allclose(1 / (1 + np.exp(-rounded)), 1 / (1 + np.exp(-exact)), atol=RELEVANCE_IN_BFLOAT16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auto_map": {"AutoModel": "nvidia/llama-nemotron-embed-1b-v2--other.LlamaBidirectionalModel"}}, "`auto_map`"),
        ({"auto_map": {"AutoModel": "llama_bidirectional_model.Other"}}, "`auto_map`"),
        ({"pooling": "last"}, '`pooling`: "last"'),
        ({"is_causal": True}, "`is_causal`: true"),
        ({"use_bidirectional_attention": False}, "`use_bidirectional_attention`: false"),
        ({"sliding_window": 8}, "`sliding_window`"),
        ({"architectures": ["LlamaForCausalLM"]}, "`architectures`"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = embedder(tmp_path / "tiny")
    edit_json(folder / "config.json", **changes)
    assert sentence in refusal(folder)


def test_a_reranker_whose_texts_begin_otherwise_is_refused(tmp_path: Path) -> None:
    folder = reranker(tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text("utf-8").replace("<|begin_of_text|>", "<|startoftext|>")
        (folder / name).write_text(text, "utf-8")
    assert "does not begin texts as the prompt of llama_bidirec" in refusal(folder, rerank=True)


def test_a_reranker_with_two_labels_is_refused(tmp_path: Path) -> None:
    folder = reranker(tmp_path / "tiny")
    edit_json(folder / "config.json", id2label={"0": "no", "1": "yes"})
    assert "a reranker has one" in refusal(folder, rerank=True)
