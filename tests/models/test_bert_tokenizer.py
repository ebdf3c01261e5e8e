"""BERT's tokenizer read as it stands is the one that transformers makes; whatever is out of the ordinary, it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_checkpoints import edit_json, tiny_bert
from vecmill.core.types import Task
from vecmill.models.bert_tokenizer import plain_bert
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.transformers_tokenizers import from_files

ADDED = {
    str(number): {
        "content": f"[{name}]",
        **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
        "special": True,
    }
    for name, number in (("PAD", 0), ("UNK", 100), ("CLS", 101), ("SEP", 102), ("MASK", 103))
}
PLAIN: dict[str, dict[str, Any]] = {
    "bundled": {},
    "fast": {"tokenizer_class": "BertTokenizerFast", "clean_up_tokenization_spaces": True},
    "saved-by-4": {"added_tokens_decoder": ADDED},
    "said-twice": {"strip_accents": None, "do_lower_case": True},
}
OTHER: dict[str, dict[str, Any]] = {
    "cased": {"do_lower_case": False},
    "accents": {"strip_accents": False},
    "chinese": {"tokenize_chinese_chars": False},
    "no-class": {"tokenizer_class": None},
    "class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "token": {"unk_token": "[MASK]"},
    "added": {"added_tokens_decoder": {**ADDED, "104": {**ADDED["103"], "content": "[E]"}}},
    "padding": {"padding_side": "left"},
    "unknown": {"model_input_names": ["input_ids", "attention_mask"]},
}


def changed(folder: Path, minilm: Path, keys: dict[str, Any]) -> Checkpoint:
    tiny_bert(folder, minilm)
    edit_json(folder / "tokenizer_config.json", **keys)
    return read(Source("tiny", folder, Task.EMBED))


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_one_is_what_transformers_makes(tmp_path: Path, minilm_folder: Path, name: str) -> None:
    checkpoint = changed(tmp_path / "tiny", minilm_folder, PLAIN[name])
    plain: Any = plain_bert(checkpoint)
    made: Any = from_files(checkpoint, needs_file=False)
    assert json.loads(plain.backend_tokenizer.to_str()) == json.loads(made.backend_tokenizer.to_str())
    assert list(plain.model_input_names) == made.model_input_names
    for attribute in ("truncation_side", "padding_side", "split_special_tokens"):
        assert getattr(plain, attribute) == getattr(made, attribute)
    assert dict(plain.special_tokens_map) == dict(made.special_tokens_map)


@pytest.mark.parametrize("name", OTHER)
def test_another_is_left_to_transformers(tmp_path: Path, minilm_folder: Path, name: str) -> None:
    """What tokenizer_config.json says is not what tokenizer.json has, or might not be."""
    assert plain_bert(changed(tmp_path / "tiny", minilm_folder, OTHER[name])) is None


@pytest.mark.parametrize("key", ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"])
def test_a_file_that_says_something_else_is_left_to_transformers(tmp_path: Path, minilm_folder: Path, key: str) -> None:
    checkpoint = changed(tmp_path / "tiny", minilm_folder, {})
    whole = json.loads(checkpoint.tokenizer_file.read_text())
    values: tuple[Any, ...] = (
        None,
        [],
        {},
        {**whole[key], "type": "Other"} if isinstance(whole[key], dict) else whole[key][:-1],
    )
    for value in values:
        checkpoint.tokenizer_file.write_text(json.dumps({**whole, key: value}))
        assert plain_bert(checkpoint) is None, value
    for side in ("truncation", "padding"):
        left = {**whole, side: {**whole[side], "direction": "Left"}}
        checkpoint.tokenizer_file.write_text(json.dumps(left))
        assert plain_bert(checkpoint) is None
    for text in ("", "[]", "{", "5"):
        checkpoint.tokenizer_file.write_text(text)
        assert plain_bert(checkpoint) is None
    checkpoint.tokenizer_file.unlink()
    assert plain_bert(checkpoint) is None
    shutil.rmtree(checkpoint.folder)
