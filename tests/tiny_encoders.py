"""Tiny random encoders of the families after BERT, with the keys of config.json and the tokenizers of the hub's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from tests.tiny_checkpoints import (
    CORPUS,
    VOCAB,
    _as_sentence_transformer,
    _randomize_vectors,
    _unigram_pieces,
    copy_tokenizer,
    edit_json,
    shortened,
    write,
)
from vecmill.core.types import Task
from vecmill.models.source import find

# As the hub's files have them, beside the sizes below. Of cross-encoders the labels come from transformers.
HUB_KEYS: Mapping[str, Mapping[str, Any]] = {
    "roberta": {  # all-distilroberta-v1, granite-embedding-125m-english
        "_name_or_path": "distilroberta-base",
        "architectures": ["RobertaForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "gradient_checkpointing": False,
        "position_embedding_type": "absolute",
        "transformers_version": "4.8.2",
        "use_cache": True,
    },
    "camembert": {  # sentence-camembert-base
        "_name_or_path": "camembert-base",
        "architectures": ["CamembertModel"],
        "gradient_checkpointing": False,
        "output_past": True,
        "position_embedding_type": "absolute",
        "use_cache": True,
    },
    "distilbert": {  # multi-qa-distilbert-cos-v1, msmarco-distilbert-base-tas-b, distiluse-base-multilingual-cased-v2
        "_name_or_path": "distilbert-base-uncased",
        "architectures": ["DistilBertForMaskedLM"],
        "output_past": True,
        "tie_weights_": True,
        "transformers_version": "4.8.2",
    },
    "electra": {  # ms-marco-electra-base
        "_name_or_path": "google/electra-base-discriminator",
        "architectures": ["ElectraModel"],
        "classifier_dropout": None,
        "position_embedding_type": "absolute",
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
        "summary_type": "first",
        "summary_use_proj": True,
        "transformers_version": "4.6.1",
    },
    "albert": {  # paraphrase-albert-small-v2
        "architectures": ["AlbertModel"],
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "gap_size": 0,
        "layers_to_keep": [],
        "net_structure_type": 0,
        "num_memory_blocks": 0,
        "output_past": True,
        "position_embedding_type": "absolute",
    },
    "mpnet": {  # all-mpnet-base-v2
        "_name_or_path": "microsoft/mpnet-base",
        "architectures": ["MPNetForMaskedLM"],
        "gradient_checkpointing": False,
        "transformers_version": "4.8.2",
    },
    "deberta-v2": {  # mxbai-rerank-base-v1
        "_name_or_path": "microsoft/deberta-v3-base",
        "architectures": ["DebertaV2ForSequenceClassification"],
        "legacy": True,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": 32,
        "torch_dtype": "float16",
        "transformers_version": "4.37.2",
    },
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "roberta": {"max_position_embeddings": 130, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "camembert": {
        "max_position_embeddings": 130,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 5,
        "eos_token_id": 6,
    },
    "distilbert": {},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16, "num_hidden_layers": 3, "hidden_act": "gelu_new"},
    "mpnet": {"max_position_embeddings": 130, "layer_norm_eps": 1e-5},
    "deberta-v2": {
        "layer_norm_eps": 1e-7,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 16,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
    },
}
USUAL_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # the default gives vectors that hardly differ
}

RENAMED: Mapping[str, Mapping[str, str]] = {
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    }
}


def tiny_encoder(
    folder: Path,
    kind: str,
    task: Task = Task.EMBED,
    *,
    pooling: str = "mean_tokens",
    max_length: int = 100,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """An encoder of 32 dimensions and 128 usable positions, with the tokenizer of its `kind` (`model_type`)."""
    torch.manual_seed(seed)
    vocab_size = _write_tokenizer(folder, kind, max_length)
    names = RENAMED.get(kind, {})
    usual = {names.get(key, key): value for key, value in USUAL_SIZES.items()}
    given = {**usual, **SIZES[kind], **sizes, "vocab_size": vocab_size}
    config = AutoConfig.for_model(kind, **given, **({"num_labels": 1} if task is Task.RERANK else {}))
    if task is Task.EMBED:
        model = AutoModel.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_config(config)
        for name, parameter in model.named_parameters():
            if "class" in name and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    _randomize_vectors(model)
    model.save_pretrained(folder)
    of_hub = dict(HUB_KEYS[kind])
    if task is Task.RERANK:
        del of_hub["architectures"]
        edit_json(folder / "config.json", **of_hub)
        return folder
    edit_json(folder / "config.json", **of_hub)
    return _as_sentence_transformer(folder, ["Transformer", "Pooling", "Normalize"], pooling, None, max_length)


def _write_tokenizer(folder: Path, kind: str, max_length: int) -> int:
    """Returns the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    return TOKENIZERS[kind](folder, max_length)


def _byte_level(folder: Path, max_length: int) -> int:
    """RoBERTa's: byte-level BPE between <s> and </s>, of which a pair has two in the middle."""
    content = _byte_level_tokenizer()
    (folder / "tokenizer.json").write_text(content, "utf-8")
    model = json.loads(content)["model"]
    write(folder / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
    named = {
        **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
        **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
        **{"unk_token": "<unk>", "pad_token": "<pad>"},
        "mask_token": {"content": "<mask>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False},
    }
    settings = {
        "add_prefix_space": False,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "RobertaTokenizer",
        "trim_offsets": True,
    }
    write(folder / "tokenizer_config.json", {**settings, **named})
    write(folder / "special_tokens_map.json", named)
    return Tokenizer.from_str(content).get_vocab_size()


@lru_cache(maxsize=1)
def _byte_level_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    specials = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer.to_str()


def _word_piece(kind: str) -> Callable[[Path, int], int]:
    """BERT's, under the class of another family that takes it as it is."""

    def put(folder: Path, max_length: int) -> int:
        copy_tokenizer(find("auto").folder, folder)
        edit_json(folder / "tokenizer_config.json", tokenizer_class=kind, model_max_length=max_length)
        return VOCAB

    return put


def _mpnet(folder: Path, max_length: int) -> int:
    """BERT's word pieces after RoBERTa's special tokens; [UNK] stays among the pieces, as all-mpnet-base-v2 has it."""
    others = {"[PAD]", "[CLS]", "[SEP]", "[MASK]"}
    content = json.loads(shortened(find("auto").folder / "tokenizer.json"))
    pieces = sorted(content["model"]["vocab"], key=lambda piece: content["model"]["vocab"][piece])
    words = ["<s>", "<pad>", "</s>", "<unk>", *(piece for piece in pieces if piece not in others), "<mask>"]
    content["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": [], "post_processor": None}))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "[UNK]", AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), False, False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    named = {
        **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
        **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
        **{"unk_token": "[UNK]", "pad_token": "<pad>", "mask_token": "<mask>"},
    }
    settings = {
        "do_lower_case": True,
        "model_max_length": max_length,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "MPNetTokenizer",
    }
    write(folder / "tokenizer_config.json", {**settings, **named})
    write(folder / "special_tokens_map.json", named)
    return len(words)


def _unigram(
    kind: str, specials: tuple[str, ...], names: Mapping[str, str], pair: str, **settings: Any
) -> Callable[[Path, int], int]:
    """Unigram pieces after the special tokens, and the mask last, as sentencepiece's files become a tokenizer.json."""

    def put(folder: Path, max_length: int) -> int:
        vocab = [*((special, 0.0) for special in specials), *_unigram_pieces(), (names["mask_token"], 0.0)]
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=specials.index(names["unk_token"]), byte_fallback=False))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        begin, end = names["cls_token"], names["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            pair=pair,
            special_tokens=[(token, specials.index(token)) for token in (begin, end)],
        )
        tokenizer.add_special_tokens([*specials, AddedToken(names["mask_token"], lstrip=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        write(
            folder / "tokenizer_config.json",
            {**settings, **names, "tokenizer_class": kind, "model_max_length": max_length},
        )
        write(folder / "special_tokens_map.json", names)
        return tokenizer.get_vocab_size()

    return put


TOKENIZERS: Mapping[str, Callable[[Path, int], int]] = {
    "bert": _word_piece("BertTokenizer"),
    "roberta": _byte_level,
    "camembert": _unigram(
        "CamembertTokenizer",
        ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"),
        {
            **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
            **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
            **{"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
        },
        "<s> $A </s> </s> $B </s>",
    ),
    "distilbert": _word_piece("DistilBertTokenizer"),
    "electra": _word_piece("ElectraTokenizer"),
    "albert": _unigram(
        "AlbertTokenizer",
        ("<pad>", "<unk>", "[CLS]", "[SEP]"),
        {
            **dict.fromkeys(("bos_token", "cls_token"), "[CLS]"),
            **dict.fromkeys(("eos_token", "sep_token"), "[SEP]"),
            **{"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "[MASK]"},
        },
        "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        do_lower_case=True,
        keep_accents=False,
        remove_space=True,
    ),
    "mpnet": _mpnet,
    "deberta-v2": _unigram(
        "DebertaV2Tokenizer",
        ("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
        {
            **dict.fromkeys(("bos_token", "cls_token"), "[CLS]"),
            **dict.fromkeys(("eos_token", "sep_token"), "[SEP]"),
            **{"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"},
        },
        "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        do_lower_case=False,
        sp_model_kwargs={},
        split_by_punct=False,
        vocab_type="spm",
    ),
}


JINA_CODE = "jinaai/jina-bert-implementation--"
OF_CODE_MODEL = "jinaai/jina-bert-v2-qk-post-norm--"


def tiny_jina(
    folder: Path, task: Task = Task.EMBED, *, code: bool = False, max_length: int = 100, seed: int = 0, **keys: Any
) -> Path:
    """A two-layer JinaBERT of 32 dimensions: the hub's config keys and weight names, no remote code.

    jina-embeddings-v2-base-en, with `code` jina-embeddings-v2-base-code, or jina-reranker-v1-tiny-en.
    """
    vocab_size = _write_tokenizer(folder, "roberta" if code else "bert", max_length)
    remote = OF_CODE_MODEL if code else JINA_CODE
    content: dict[str, Any] = {
        "_name_or_path": remote.removesuffix("--"),
        "architectures": ["JinaBertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": None,
        "auto_map": {
            "AutoConfig": f"{remote}configuration_bert.JinaBertConfig",
            "AutoModel": f"{remote}modeling_bert.JinaBertModel",
            "AutoModelForMaskedLM": f"{remote}modeling_bert.JinaBertForMaskedLM",
            "AutoModelForSequenceClassification": f"{remote}modeling_bert.JinaBertForSequenceClassification",
        },
        "classifier_dropout": None,
        "emb_pooler": "mean",
        "feed_forward_type": "geglu",
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 128,
        "model_max_length": 8192,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "position_embedding_type": "alibi",
        "torch_dtype": "float32",
        "transformers_version": "4.26.0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": vocab_size,
        **keys,
    }
    write(folder / "config.json", content)
    shapes = _jina_shapes(content, code=code)
    if task is Task.RERANK:
        width = content["hidden_size"]
        shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
        shapes = {f"bert.{name}": shape for name, shape in shapes.items()}
        shapes |= {"classifier.weight": (1, width), "classifier.bias": (1,)}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if "norm" in name.lower():
            weight.mul_(0.3).add_(1.0 if name.endswith("weight") else 0.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if task is Task.RERANK:
        return folder
    return _as_sentence_transformer(folder, ["Transformer", "Pooling"], "mean_tokens", None, max_length)


def _jina_shapes(config: Mapping[str, Any], *, code: bool) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
    }
    norms = ["embeddings.LayerNorm"]
    linear: dict[str, tuple[int, ...]] = {}
    for layer in (f"encoder.layer.{number}" for number in range(config["num_hidden_layers"])):
        of_attention = ("self.query", "self.key", "self.value", "output.dense")
        linear |= {f"{layer}.attention.{part}": (width, width) for part in of_attention}
        norms += [f"{layer}.attention.output.LayerNorm"]
        if code:
            norms += [f"{layer}.attention.self.layer_norm_{part}" for part in "qk"]
            norms += [f"{layer}.layer_norm_{number}" for number in (1, 2)]
            shapes[f"{layer}.mlp.up_gated_layer.weight"] = (2 * inner, width)
            linear[f"{layer}.mlp.down_layer"] = (width, inner)
        elif config["feed_forward_type"] == "original":
            linear |= {f"{layer}.intermediate.dense": (inner, width), f"{layer}.output.dense": (width, inner)}
            norms += [f"{layer}.output.LayerNorm"]
        else:
            shapes[f"{layer}.mlp.gated_layers.weight"] = (2 * inner, width)
            linear[f"{layer}.mlp.wo"] = (width, inner)
            norms += [f"{layer}.mlp.layernorm"]
    shapes |= {f"{norm}.{leaf}": (width,) for norm in norms for leaf in ("weight", "bias")}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linear.items()}
