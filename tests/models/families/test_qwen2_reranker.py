"""Rerankers whose words and scale their card says: mxbai-rerank-v2 on a Qwen2, zerank on a Qwen3; by their logits. And
Querit, whose head has two labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.checkpoints.variants import refusal
from tests.conftest import serving
from tests.models.families import TinyModel
from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import edit_json, write
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


def tiny_querit(folder: Path) -> Path:
    """As the hub has it: Qwen3's weights and a head, under a class of its own that no `auto_map` names."""
    folder = plain_qwen3(folder / "Querit-4B")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[CLS]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    token = {"content": "[CLS]", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    added[str(tokenizer.token_to_id("[CLS]"))] = {**token, "single_word": False}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added, model_max_length=131072)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights |= {"head.weight": torch.randn(2, 32, generator=generator), "head.bias": torch.tensor([0.3, -0.8])}
    table = weights["model.embed_tokens.weight"]
    more = tokenizer.get_vocab_size() - len(table)
    if more > 0:
        weights["model.embed_tokens.weight"] = torch.cat([table, torch.randn(more, 32, generator=generator)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocab_size = len(weights["model.embed_tokens.weight"])
    edit_json(folder / "config.json", architectures=["MLQwen3Model"], vocab_size=vocab_size)
    return folder


TINY = (
    TinyModel(Task.RERANK, "qwen2", tiny_mxbai, prefixes=True),
    TinyModel(Task.RERANK, "qwen3", tiny_querit, prefixes=True, layout="two-labels"),
)


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


def plain_qwen3(folder: Path) -> Path:
    """A Qwen3 of which no file says that it is a reranker."""
    shutil.copytree(TOKENIZER, folder)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").unlink()
    return folder


async def test_zerank_is_asked_for_yes_alone_and_divides_its_logit(tmp_path: Path) -> None:
    folder = plain_qwen3(tmp_path / "zerank-2")
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


@torch.inference_mode()
def querit_labels(folder: Path, text: str) -> torch.Tensor:
    """(2,) logits of a text that ends with [CLS]."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert tokens["input_ids"][0, -1] == tokenizer.convert_tokens_to_ids("[CLS]")
    last: torch.Tensor = model(**tokens).last_hidden_state[0, -1]
    return weights["head.weight"] @ last + weights["head.bias"]


async def test_querits_score_is_the_log_odds_of_the_second_label(tmp_path: Path) -> None:
    """Its own score, the difference of the two probabilities, is 2 p - 1 of ours."""
    folder = tiny_querit(tmp_path)
    judge = "Judge whether the Content meets the requirements based on the Query."
    for fields, task in (({}, judge), ({"instruction": "Find code."}, "Find code.")):
        texts = [f"{task} Query: {QUERY}; Content: {document}[CLS]" for document in DOCUMENTS]
        labels = torch.stack([querit_labels(folder, text) for text in texts])
        logits, own = labels[:, 1] - labels[:, 0], labels.softmax(dim=1) @ torch.tensor([-1.0, 1.0])
        np.testing.assert_allclose(await served_scores(folder, **fields), logits, atol=1e-4)
        relevance = await served_scores(folder, **{**fields, "raw_scores": False})
        np.testing.assert_allclose(2 * np.array(relevance) - 1, own, atol=1e-5)


def test_querit_is_known_by_its_name_and_its_head(tmp_path: Path) -> None:
    folder = tiny_querit(tmp_path)
    assert "this is a reranker; name it in RERANK_MODEL" in refusal(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.weight": torch.ones(1, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "head.weight has the shape (1, 32) instead of (2, 32)" in refusal(folder, rerank=True)
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})
    assert "does not have the token '[CLS]'" in refusal(folder, rerank=True)
    assert "whose prompt is known" in refusal(folder.rename(tmp_path / "another"), rerank=True)
