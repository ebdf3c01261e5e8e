"""BERT's tokenizer without transformers, where the files leave no doubt what transformers would make of them.

transformers' BertTokenizer takes the vocabulary of tokenizer.json and makes all else anew, by tokenizer_config.json.
Where tokenizer.json says just the same, word for word, it can be read as it stands. Anything out of the ordinary is
left to transformers.

Source: transformers 5.24, models/bert/tokenization_bert.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from vecmill.models.checkpoint import Checkpoint
from vecmill.models.keys import read_json

SPECIAL = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
CLASSES = ("BertTokenizer", "BertTokenizerFast")
# Of tokenizer_config.json: read below, of no account to the class (HARMLESS in `tokenizer_files`), or the length, which
# the checkpoint has.
READ = {*SPECIAL, "tokenizer_class", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "added_tokens_decoder"}
IGNORED = {
    *("clean_up_tokenization_spaces", "do_basic_tokenize", "max_len", "max_length", "model_max_length", "name_or_path"),
    *("never_split", "pad_to_multiple_of", "pad_token_type_id", "special_tokens_map_file", "stride"),
    "truncation_strategy",
}


@dataclass(frozen=True, slots=True)
class PlainTokenizer:
    """What is asked of a tokenizer of transformers, by its names."""

    backend_tokenizer: Tokenizer
    model_input_names: tuple[str, ...] = ("input_ids", "token_type_ids", "attention_mask")
    truncation_side: str = "right"
    padding_side: str = "right"
    split_special_tokens: bool = False
    special_tokens_map: Mapping[str, str] = field(default_factory=lambda: dict(SPECIAL))


def plain_bert(checkpoint: Checkpoint) -> PlainTokenizer | None:
    """A BERT's tokenizer; None where transformers has to make it."""
    if checkpoint.config.get("model_type") != "bert" or checkpoint.tokenizer.arguments:
        return None
    folder, file = checkpoint.tokenizer_file.parent, checkpoint.tokenizer_file
    if not file.is_file() or (folder / "added_tokens.json").is_file():
        return None
    config = read_json(checkpoint.named, folder / "tokenizer_config.json")
    special = read_json(checkpoint.named, folder / "special_tokens_map.json")
    try:
        definition = file.read_text("utf-8")
        content = json.loads(definition)
        if not _is_plain(config, special, content):
            return None
        return PlainTokenizer(Tokenizer.from_str(definition))
    except Exception:  # whatever it holds: transformers' way says what is wrong with it
        return None


def _is_plain(config: Mapping[str, Any], special: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    vocabulary = content["model"]["vocab"]
    if type(vocabulary) is not dict or not vocabulary.keys() >= set(SPECIAL.values()):
        return False
    return _is_plain_config(config, special, vocabulary) and _is_plain_file(config, content, vocabulary)


def _is_plain_config(config: Mapping[str, Any], special: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    named = [*((key, value) for key, value in config.items() if key in SPECIAL), *special.items()]
    decoder = config.get("added_tokens_decoder")
    return (
        config.keys() <= READ | IGNORED
        and config.get("tokenizer_class") in CLASSES
        and all(SPECIAL.get(key) == value for key, value in named)
        and all(type(config.get(key, True)) is bool for key in ("do_lower_case", "tokenize_chinese_chars"))
        and config.get("strip_accents") in (None, False, True)
        and (decoder is None or decoder == {str(vocabulary[token]): _added(token) for token in SPECIAL.values()})
    )


def _is_plain_file(config: Mapping[str, Any], content: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    added = sorted(
        ({**_added(token), "id": vocabulary[token]} for token in SPECIAL.values()), key=lambda each: each["id"]
    )
    made = {
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }
    model = {key: value for key, value in content["model"].items() if key != "vocab"}
    sides = [(content.get(key) or {}).get("direction", "Right") for key in ("truncation", "padding")]
    return (
        {key: content.get(key) for key in made} == made
        and sides == ["Right", "Right"]
        and model
        == {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        }
    )


def _added(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def _post_processor(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """[CLS] A [SEP], and [CLS] A [SEP] B [SEP]."""

    def token(text: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": kind}}

    def sequence(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [token("[CLS]", 0), sequence("A", 0), token("[SEP]", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, sequence("B", 1), token("[SEP]", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary[text]], "tokens": [text]} for text in ("[CLS]", "[SEP]")
        },
    }
