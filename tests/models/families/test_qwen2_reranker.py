"""Rerankers whose words and scale their card says: mxbai-rerank-v2 on a Qwen2, zerank on a Qwen3; by their logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import write
from vecmill.core.types import Task

TOKENIZER = GOLDEN / "qwen3" / "reranker"
QUERY, DOCUMENTS = "How do I parse dates", ("one", "Plants create oxygen.", "naïve 你好 ÉCOLE")
SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
END = "<|im_end|>\n<|im_start|>assistant\n"


def tiny_mxbai(folder: Path) -> Path:
    """As the hub has it: a plain language model, under the published name."""
    folder = folder / "mxbai-rerank-base-v2"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=476,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


TINY = (TinyModel(Task.RERANK, "qwen2", tiny_mxbai, prefixes=True),)


@torch.inference_mode()
def logits(folder: Path, text: str, *words: str) -> list[float]:
    """Of the words after a text, by transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    last = model(**tokens).logits[0, -1]
    return [float(last[tokenizer.convert_tokens_to_ids(word)]) for word in words]


async def served_scores(folder: Path, **fields: object) -> list[float]:
    async with serving(rerank_model=str(folder)) as client:
        body = {"query": QUERY, "documents": list(DOCUMENTS), "raw_scores": True, **fields}
        answer = await client.post("/v1/rerank", json=body)
    assert answer.is_success, answer.text
    results = sorted(answer.json()["results"], key=lambda result: int(result["index"]))
    return [result["relevance_score"] for result in results]


async def test_mxbai_rerank_v2_answers_with_a_digit(tmp_path: Path) -> None:
    folder = tiny_mxbai(tmp_path)
    for fields, before in (({}, ""), ({"instruction": "Find code"}, "instruction: Find code\n")):
        wanted = []
        for document in DOCUMENTS:
            text = f"{SYSTEM}<|im_start|>user\n{before}query: {QUERY}\ndocument: {document}\n{TASK}{END}"
            one, zero = logits(folder, text, "1", "0")
            wanted.append(one - zero)
        np.testing.assert_allclose(await served_scores(folder, **fields), wanted, atol=1e-4)


async def test_zerank_is_asked_for_yes_alone_and_divides_its_logit(tmp_path: Path) -> None:
    folder = shutil.copytree(TOKENIZER, tmp_path / "zerank-2")
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Yes"] = vocabulary.pop("yes")  # the tiny tokenizer has the small one alone
    merges = [pair for pair in tokenizer["model"]["merges"] if pair[1] != "yes"]
    tokenizer["model"]["merges"] = [["Y", "es"] if pair == ["y", "es"] else pair for pair in merges]
    write(folder / "tokenizer.json", tokenizer)
    wanted = []
    for document in DOCUMENTS:
        text = f"<|im_start|>system\n{QUERY}<|im_end|>\n<|im_start|>user\n{document}{END}"
        [yes] = logits(folder, text, "Yes")
        wanted.append(yes / 5)
    np.testing.assert_allclose(await served_scores(folder), wanted, atol=1e-4)
