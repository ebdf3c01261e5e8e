"""Tiny random checkpoints in the hub's sentence-transformers layout, written by the test that needs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

VOCAB = 30522  # the bundled tokenizer's


def tiny_bert(
    folder: Path,
    tokenizer_from: Path,
    *,
    pooling: str = "mean_tokens",
    prompts: Mapping[str, str] | None = None,
    max_seq_length: int | None = 64,
    seed: int = 0,
) -> Path:
    """A two-layer BERT of 32 dimensions with the bundled model's tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,  # the default gives vectors that hardly differ
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, folder / name)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if kind == "Transformer" else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 32,
            f"pooling_mode_{pooling}": True,
            **{f"pooling_mode_{other}": False for other in {"mean_tokens", "cls_token", "lasttoken"} - {pooling}},
        },
    )
    write(folder / "config_sentence_transformers.json", {"prompts": dict(prompts or {})})
    if max_seq_length is not None:
        write(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    return folder


def write(path: Path, content: object) -> None:
    """JSON into a file whose folder may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
