"""Tiny random checkpoints in the hub's layouts, written by the test that needs them."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

VOCAB = 30522  # the bundled tokenizer's

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not jump over the fox.",
    "Plants create oxygen through a process that is known as photosynthesis.",
    "def add(first, second): return first + second",
    "for index in range(len(values)): print(index, values[index])",
    "A query is short; a document, a text or a passage is longer than the query.",
    "Die Straße führt über die Brücke; über die Brücke führt die Straße.",
    "El niño comió una manzana en el jardín. La naïve niña, una pera.",
    "你好世界。你好我的朋友。",
    "Привет, мир! Привет, друг! Как дела?",
)
LONGEST_PIECE = 8


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
    BertModel(_bert_config(), add_pooling_layer=False).save_pretrained(folder)
    _copy_tokenizer(tokenizer_from, folder)
    kinds = ["Transformer", "Pooling", "Normalize"]
    return _as_sentence_transformer(folder, kinds, pooling, prompts, max_seq_length)


def tiny_xlm_roberta(
    folder: Path,
    *,
    pooling: str = "mean_tokens",
    prompts: Mapping[str, str] | None = None,
    max_seq_length: int | None = 128,
    seed: int = 0,
) -> Path:
    """A two-layer XLM-RoBERTa of 32 dimensions, 128 usable positions and a Unigram tokenizer of its own."""
    torch.manual_seed(seed)
    model = XLMRobertaModel(_xlm_roberta_config())  # with the pooler nobody uses, as bge-m3 and multilingual-e5 have it
    _randomize_vectors(model)
    model.save_pretrained(folder)
    _write_xlm_roberta_tokenizer(folder, max_length=128)
    kinds = ["Transformer", "Pooling", "Normalize"]
    return _as_sentence_transformer(folder, kinds, pooling, prompts, max_seq_length)


def tiny_cross_encoder(
    folder: Path,
    *,
    kind: Literal["bert", "xlm-roberta"],
    num_labels: int = 1,
    tokenizer_from: Path | None = None,
    max_length: int = 128,
    seed: int = 0,
) -> Path:
    """A reranker as ms-marco-MiniLM ("bert", with `tokenizer_from`) or bge-reranker ("xlm-roberta") lies on the hub.

    `max_length` is what its tokenizer_config.json allows; the positions are 128 always.
    """
    torch.manual_seed(seed)
    model: Any
    if kind == "bert":
        if tokenizer_from is None:
            raise ValueError("a BERT cross-encoder needs tokenizer_from")
        model = BertForSequenceClassification(_bert_config(num_labels=num_labels))
        heads = [model.classifier]
    else:
        model = XLMRobertaForSequenceClassification(_xlm_roberta_config(num_labels=num_labels))
        heads = [model.classifier.dense, model.classifier.out_proj]
    _randomize_vectors(model)
    for head in heads:
        torch.nn.init.normal_(head.weight, std=0.5)
    model.save_pretrained(folder)
    if tokenizer_from is not None and kind == "bert":
        _copy_tokenizer(tokenizer_from, folder)
        edit_json(folder / "tokenizer_config.json", model_max_length=max_length)
        # as ms-marco-MiniLM says that its scores are raw; bge-reranker says nothing
        edit_json(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    else:
        _write_xlm_roberta_tokenizer(folder, max_length)
    return folder


def tiny_nomic(folder: Path, tokenizer_from: Path, *, seed: int = 0, prompts: Mapping[str, str] | None = None) -> Path:
    """A two-layer nomic-embed-text-v1.5 of 32 dimensions: the hub's config keys and weight names, no remote code."""
    width, inner, layers, positions, vocab = 32, 64, 2, 256, 30528
    remote = "nomic-ai/nomic-bert-2048--"
    config = {
        "activation_function": "swiglu",
        "architectures": ["NomicBertModel"],
        "attn_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": f"{remote}configuration_hf_nomic_bert.NomicBertConfig",
            "AutoModel": f"{remote}modeling_hf_nomic_bert.NomicBertModel",
            "AutoModelForMaskedLM": f"{remote}modeling_hf_nomic_bert.NomicBertForPreTraining",
        },
        "causal": False,
        "embd_pdrop": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-12,
        "max_trained_positions": 128,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "model_type": "nomic_bert",
        "n_embd": width,
        "n_head": 4,
        "n_inner": inner,
        "n_layer": layers,
        "n_positions": positions,
        "pad_vocab_size_multiple": 64,
        "parallel_block": False,
        "parallel_block_tied_norm": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "resid_pdrop": 0.0,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "torch_dtype": "float32",
        "type_vocab_size": 2,
        "use_rms_norm": False,
        "vocab_size": vocab,
    }
    write(folder / "config.json", config)
    save_file(
        _nomic_weights(width, inner, layers, vocab, seed), folder / "model.safetensors", metadata={"format": "pt"}
    )
    _copy_tokenizer(tokenizer_from, folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=positions)
    return _as_sentence_transformer(folder, ["Transformer", "Pooling"], "mean_tokens", prompts, positions)


def write(path: Path, content: object) -> None:
    """JSON into a file whose folder may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Set some keys of a JSON object's file."""
    write(path, {**json.loads(path.read_text("utf-8")), **changes})


def _bert_config(**others: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,  # the default gives vectors that hardly differ
        **others,
    )


def _xlm_roberta_config(**others: Any) -> XLMRobertaConfig:
    return XLMRobertaConfig(
        vocab_size=Tokenizer.from_str(_unigram_tokenizer()).get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,  # positions begin after the padding's id: 128 are usable
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.3,
        **others,
    )


def _randomize_vectors(model: Any) -> None:
    """Biases and norms too: fresh ones are zeros and ones, which would hide a weight that was left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _nomic_weights(width: int, inner: int, layers: int, vocab: int, seed: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of the hub's file; its linear layers have no biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embeddings.word_embeddings.weight": (vocab, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    norms = ["emb_ln"]
    for layer in (f"encoder.layers.{index}" for index in range(layers)):
        shapes[f"{layer}.attn.Wqkv.weight"] = (3 * width, width)
        shapes[f"{layer}.attn.out_proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.fc11.weight"] = (inner, width)
        shapes[f"{layer}.mlp.fc12.weight"] = (inner, width)
        shapes[f"{layer}.mlp.fc2.weight"] = (width, inner)
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for norm in norms:
        weights[f"{norm}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        weights[f"{norm}.bias"] = 0.1 * torch.randn(width, generator=generator)
    return weights


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _write_xlm_roberta_tokenizer(folder: Path, max_length: int) -> None:
    (folder / "tokenizer.json").write_text(_unigram_tokenizer(), "utf-8")
    named = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    # XLMRobertaTokenizer, the hub's class, would be rebuilt by transformers 5 instead of read from tokenizer.json
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write(folder / "tokenizer_config.json", {**named, **kind, "model_max_length": max_length})
    write(folder / "special_tokens_map.json", named)


@lru_cache(maxsize=1)
def _unigram_tokenizer() -> str:
    """A tokenizer.json as XLM-RoBERTa's: Unigram pieces between <s> and </s>, `<mask>` last."""
    pieces = _unigram_pieces()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [*((special, 0.0) for special in specials), *pieces, ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*specials, AddedToken("<mask>", lstrip=True)])
    return tokenizer.to_str()


def _unigram_pieces() -> list[tuple[str, float]]:
    """Every character of the corpus, and every part of a word that occurs twice, with its log probability.

    Counted here because UnigramTrainer's scores and order differ from run to run.
    """
    counts: Counter[str] = Counter()
    for word in (f"▁{word}" for line in CORPUS for word in line.split()):
        for start in range(len(word)):
            counts.update(word[start:end] for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1))
    kept = {piece: count for piece, count in counts.items() if count > 1 or len(piece) == 1}
    total = sum(kept.values())
    return [(piece, math.log(count / total)) for piece, count in sorted(kept.items(), key=lambda kv: (-kv[1], kv[0]))]


def _as_sentence_transformer(
    folder: Path,
    kinds: Sequence[str],
    pooling: str,
    prompts: Mapping[str, str] | None,
    max_seq_length: int | None,
) -> Path:
    """The files beside the model's that sentence-transformers reads."""
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
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir(exist_ok=True)
    write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 32,
            f"pooling_mode_{pooling}": True,
            **{
                f"pooling_mode_{other}": False
                for other in ("mean_tokens", "cls_token", "lasttoken")
                if other != pooling
            },
        },
    )
    write(folder / "config_sentence_transformers.json", {"prompts": dict(prompts or {})})
    if max_seq_length is not None:
        write(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    return folder


def tiny_decoder(
    folder: Path,
    config: Any,
    tokenizer_from: Path,
    *,
    pooling: str = "lasttoken",
    prompts: Mapping[str, str] | None = None,
    seed: int = 0,
    **tokenizer: Any,
) -> Path:
    """A causal language model as an embedder, with the tokenizer of another folder.

    Args:
        config: of transformers: Qwen2Config, MistralConfig, LlamaConfig. It gets the vocabulary's size.
        tokenizer: further keys of tokenizer_config.json.
    """
    torch.manual_seed(seed)
    config.vocab_size = Tokenizer.from_file(str(tokenizer_from / "tokenizer.json")).get_vocab_size()
    config.update({"initializer_range": 0.3})
    model = AutoModel.from_config(config)
    _randomize_vectors(model)
    model.save_pretrained(folder)
    _copy_tokenizer(tokenizer_from, folder)
    edit_json(folder / "tokenizer_config.json", **tokenizer)
    kinds = ["Transformer", "Pooling", "Normalize"]
    return _as_sentence_transformer(folder, kinds, pooling, prompts, config.max_position_embeddings)


def around_texts(folder: Path, *, first: str | None = None, last: str) -> None:
    """The template of tokenizer.json puts these special tokens around every text."""
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokens = [token for token in (first, last) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0" if first else f"$A:0 {last}:0",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens],
    )
    tokenizer.save(str(file))


def plain_tokenizer(folder: Path) -> Tokenizer:
    """A checkpoint's tokenizer, read by the library alone; it neither pads nor cuts, whatever its file says."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
