"""A BERT with wide vectors and random weights: its answers are as large as a large model's, its forward pass is not."""

import json
import shutil
from pathlib import Path

import torch
from transformers import BertConfig, BertModel
from transformers.utils import logging

SEED = 0
MAX_TOKENS = 64
HEAD_DIMENSIONS = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def write_wide_model(folder: Path, dimensions: int, tokenizer_from: Path) -> Path:
    """One layer, so many dimensions (a multiple of HEAD_DIMENSIONS), and the tokenizer of another model's folder."""
    torch.manual_seed(SEED)
    logging.disable_progress_bar()
    config = BertConfig(
        vocab_size=json.loads((tokenizer_from / "config.json").read_text("utf-8"))["vocab_size"],
        hidden_size=dimensions,
        num_hidden_layers=1,
        num_attention_heads=dimensions // HEAD_DIMENSIONS,
        intermediate_size=64,  # the least work that is still the family's
        max_position_embeddings=MAX_TOKENS,
    )
    # Half of float32's half a gigabyte of token embeddings.
    BertModel(config, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, folder / name)
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_TOKENS}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": dimensions, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
