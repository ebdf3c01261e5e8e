"""Tiny random checkpoints in the hub's layouts, written by the test that needs them."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    EmbeddingGemma2Config,
    EmbeddingGemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    Ministral3Config,
    Ministral3Model,
    Mistral3Config,
    Mistral3Model,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

# The bundled tokenizer's first: its most frequent words, and pieces of others. To read all 30,522 takes most of the
# time in which a tiny model is loaded.
VOCAB = 8192

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
    copy_tokenizer(tokenizer_from, folder)
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
        copy_tokenizer(tokenizer_from, folder)
        edit_json(folder / "tokenizer_config.json", model_max_length=max_length)
        # as ms-marco-MiniLM says that its scores are raw; bge-reranker says nothing
        edit_json(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    else:
        _write_xlm_roberta_tokenizer(folder, max_length)
    return folder


def tiny_nomic(folder: Path, tokenizer_from: Path, *, seed: int = 0, prompts: Mapping[str, str] | None = None) -> Path:
    """A two-layer nomic-embed-text-v1.5 of 32 dimensions: the hub's config keys and weight names, no remote code."""
    width, inner, layers, positions, vocab = 32, 64, 2, 256, VOCAB
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
    copy_tokenizer(tokenizer_from, folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=positions)
    return _as_sentence_transformer(folder, ["Transformer", "Pooling"], "mean_tokens", prompts, positions)


def tiny_nomic_mixture(folder: Path, *, prompts: Mapping[str, str] | None = None, seed: int = 0, **config: Any) -> Path:
    """A four-layer nomic-embed-text-v2-moe of 32 dimensions, with four experts in layers 1 and 3: the hub's config keys
    and weight names, no remote code.

    Which experts a token gets hangs on the first dimensions of its embedding, where no two values are near each other:
    rounding never decides.
    """
    width, inner, layers, experts, positions = 32, 64, 4, 4, 128
    vocab = -(-Tokenizer.from_str(_unigram_tokenizer()).get_vocab_size() // 64) * 64
    remote = "nomic-ai/nomic-bert-2048--"
    content = {
        "_name_or_path": "nomic-ai/nomic-xlm-2048",
        "activation_function": "gelu",
        "add_pooling_layer": False,
        "architectures": ["NomicBertModel"],
        "attn_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": f"{remote}configuration_hf_nomic_bert.NomicBertConfig",
            "AutoModel": f"{remote}modeling_hf_nomic_bert.NomicBertModel",
            "AutoModelForMaskedLM": f"{remote}modeling_hf_nomic_bert.NomicBertForPreTraining",
        },
        "bos_token_id": None,
        "causal": False,
        "dense_seq_output": True,
        "embd_pdrop": 0.1,
        "eos_token_id": None,
        "expert_choice_router": False,
        "ffn_div": 1,
        "fused_bias_fc": True,
        "fused_dropout_add_ln": True,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "max_trained_positions": positions,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "model_type": "nomic_bert",
        "moe_every_n_layers": 2,
        "moe_impl": "megablocks",
        "moe_normalize_expert_weights": False,
        "moe_resid_pdrop": 0.0,
        "moe_top_k": 2,
        "n_embd": width,
        "n_head": 4,
        "n_inner": inner,
        "n_layer": layers,
        "n_positions": positions,
        "num_experts": experts,
        "num_shared_experts": 0,
        "pad_token_id": 1,
        "pad_vocab_size_multiple": 64,
        "parallel_block": False,
        "parallel_block_tied_norm": False,
        "prenorm": False,
        "qkv_proj_bias": True,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "rotary_emb_base": 10000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "router_aux_loss_coef": 0.1,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "torch_dtype": "float32",
        "transformers_version": "4.44.2",
        "type_vocab_size": 1,
        "use_cache": True,
        "use_flash_attn": True,
        "use_rms_norm": None,
        "use_xentropy": True,
        "vocab_size": vocab,
    }
    write(folder / "config.json", {**content, **config})
    weights = _nomic_mixture_weights(width, inner, layers, experts, vocab, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_xlm_roberta_tokenizer(folder, max_length=positions)
    return _as_sentence_transformer(folder, ["Transformer", "Pooling", "Normalize"], "mean_tokens", prompts, positions)


WINDOW = 16
GEMMA_MERGES = (("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n"), ("in", "g"), ("e", "r"), ("o", "n"))


def tiny_gemma3(
    folder: Path, *, both_ways: bool = True, prompts: Mapping[str, str] | None = None, seed: int = 0, **config: Any
) -> Path:
    """A three-layer Gemma 3 of 32 dimensions, the last layer with full attention: EmbeddingGemma-300M without its dense
    layers, or harrier-oss-v1-270m (not `both_ways`).

    Texts begin with <bos>, and end with <eos> in the former.
    """
    torch.manual_seed(seed)
    write_gemma_tokenizer(folder, ends=both_ways)
    settings = {
        "vocab_size": len(gemma_vocabulary()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "max_position_embeddings": 256,
        "use_bidirectional_attention": both_ways,
        "initializer_range": 0.3,
    }
    model = Gemma3TextModel(Gemma3TextConfig(**{**settings, **config}))
    _randomize_vectors(model)
    model.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", "Normalize"]
    return _as_sentence_transformer(folder, kinds, "mean_tokens" if both_ways else "lasttoken", prompts, 200)


SCALES_FROM = 64
MINISTRAL3 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "is_causal": False,
    "initializer_range": 0.3,
    "rope_parameters": {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": SCALES_FROM,
        "max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
"""Nemotron-3-Embed's text model in small; queries are scaled from position SCALES_FROM on."""


def tiny_ministral3(folder: Path, *, prompts: Mapping[str, str] | None = None, seed: int = 0, **config: Any) -> Path:
    """A two-layer Nemotron-3-Embed of 32 dimensions: looks both ways, mean. Its tokenizer is XLM-RoBERTa's."""
    torch.manual_seed(seed)
    vocabulary = Tokenizer.from_str(_unigram_tokenizer()).get_vocab_size()
    model = Ministral3Model(Ministral3Config(**{**MINISTRAL3, "vocab_size": vocabulary, "pad_token_id": 1, **config}))
    _randomize_vectors(model)
    model.save_pretrained(folder)
    edit_json(folder / "config.json", pooling="avg")
    _write_xlm_roberta_tokenizer(folder, max_length=256)
    kinds = ["Transformer", "Pooling", "Normalize"]
    return _as_sentence_transformer(folder, kinds, "mean_tokens", prompts, 200)


MARKING_TEMPLATE = """\
{%- macro own(text) -%}
{{- text | replace("[INST]", "[\u200cINST]") | replace("[IMG]", "[\u200cIMG]") -}}{%- endmacro -%}
{%- macro content(message) -%}{%- for part in message["content"] -%}
{%- if part["type"] == "image" -%}{{- "[IMG]" -}}{%- elif message["role"] == "user" -%}{{- own(part["text"]) -}}
{%- else -%}{{- part["text"] -}}{%- endif -%}{%- endfor -%}{%- endmacro -%}
{%- for each in messages -%}{%- if not loop.first -%}{{- " " -}}{%- endif -%}{{- content(each) -}}{%- endfor -%}"""
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def tiny_mistral3(
    folder: Path, *, prompts: Mapping[str, str] | None = None, template: str = MARKING_TEMPLATE, seed: int = 0
) -> Path:
    """A Nemotron-3.5-Embed in small: with weights for pictures, and a chat template that joins prompt and text."""
    tiny_ministral3(folder, prompts=prompts)
    torch.manual_seed(seed)
    vocabulary = plain_tokenizer(folder).get_vocab_size()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "ministral3", **MINISTRAL3, "vocab_size": vocabulary, "pad_token_id": 1},
        vision_config={"model_type": "pixtral", **vision, "image_size": 16, "patch_size": 4},
        image_token_index=3,
    )
    model = Mistral3Model(config)
    _randomize_vectors(model)
    model.save_pretrained(folder)
    edit_json(folder / "config.json", pooling="avg")
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    write(folder / "processor_config.json", {"processor_class": "PixtralProcessor", "patch_size": 4})
    modality_config = {"text": FORWARD, "image": FORWARD, "message": {**FORWARD, "format": "structured"}}
    edit_json(
        folder / "sentence_bert_config.json", modality_config=modality_config, module_output_name="token_embeddings"
    )
    return folder


PAIR_TEMPLATE = (
    "{% for m in messages if m.role == 'query' %}question: {{ m.content[0].text }}{% endfor %}\n \n"
    "{% for m in messages if m.role == 'document' %}passage: {{ m.content[0].text }}{% endfor %}"
)


def tiny_nemotron_rerank(folder: Path, *, temperature: float = 0.5, seed: int = 0) -> Path:
    """A Nemotron-3.5-Rerank in small, as its exporter writes it: a Mistral 3 with a head, and a Dense that is that head
    divided by the temperature."""
    tiny_mistral3(folder, template=PAIR_TEMPLATE, seed=seed)
    score_vectors(folder, scores(bias=False))
    modality_config = {"text": FORWARD, "message": {**FORWARD, "format": "structured"}}
    edit_json(folder / "sentence_bert_config.json", modality_config=modality_config)
    edit_json(
        folder / "config.json",
        architectures=["Mistral3ForSequenceClassification"],
        auto_map={"AutoModelForSequenceClassification": "model.Mistral3ForSequenceClassification"},
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        score_temperature=temperature,
        is_causal=False,
    )
    weights = load_file(folder / "model.safetensors")
    head = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    weights["language_model.score.weight"] = head * temperature
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_embedding_gemma2(
    folder: Path, *, prompts: Mapping[str, str] | None = None, seed: int = 0, **config: Any
) -> Path:
    """A three-layer EmbeddingGemma 2 of 32 dimensions within and 24 without, its last layer wider and with full
    attention; its files say that it reads pictures, of which it has no weights."""
    torch.manual_seed(seed)
    write_gemma_tokenizer(folder, ends=True)
    text = {
        "vocab_size": len(gemma_vocabulary()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "hidden_size_per_layer_input": 16,
        "embedding_dim": 24,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    model = EmbeddingGemma2Model(EmbeddingGemma2Config(text_config={**text, **config}))
    _randomize_vectors(model)
    for layer in model.language_model.layers:
        layer.layer_scalar.fill_(0.8)
    model.save_pretrained(folder)
    write(folder / "processor_config.json", {"processor_class": "EmbeddingGemma2Processor"})
    kinds = ["Transformer", "Pooling", "Normalize"]
    _as_sentence_transformer(folder, kinds, "mean_tokens", prompts, 200)
    edit_json(folder / "1_Pooling" / "config.json", word_embedding_dimension=24)
    edit_json(
        folder / "sentence_bert_config.json",
        modality_config={"text": FORWARD, "image": FORWARD},
        module_output_name="token_embeddings",
    )
    return folder


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_llama_bidirec(
    folder: Path,
    tokenizer_from: Path,
    *,
    reranker: bool = False,
    prompts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """A two-layer llama-nemotron-embed-1b-v2 of 32 dimensions, or llama-nemotron-rerank-1b-v2: the hub's config keys
    and weight names, no remote code.

    Args:
        tokenizer_from: a folder with a byte-level BPE; <|begin_of_text|> is added to it.
    """
    torch.manual_seed(seed)
    _write_llama3_tokenizer(folder, tokenizer_from)
    tokens = plain_tokenizer(folder).get_vocab_size()
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        rope_parameters={**LLAMA3_ROPE, "rope_theta": 500_000.0},
        num_labels=1,
    )
    model: Any = LlamaForSequenceClassification(config) if reranker else LlamaModel(config)
    _randomize_vectors(model)
    model.save_pretrained(folder)
    kind = "LlamaBidirectional" + ("ForSequenceClassification" if reranker else "Model")
    code = "llama_bidirectional_model."
    auto = {"AutoConfig": f"{code}LlamaBidirectionalConfig", f"AutoModel{kind[18:].removesuffix('Model')}": code + kind}
    edit_json(
        folder / "config.json",
        model_type="llama_bidirec",
        architectures=[kind],
        auto_map=auto,
        pooling="avg",
        temperature=0.5 if reranker else 0.02,
        rope_parameters=None,
        rope_scaling=LLAMA3_ROPE,
        rope_theta=500_000.0,
    )
    if reranker:
        return folder
    return _as_sentence_transformer(folder, ["Transformer", "Pooling", "Normalize"], "mean_tokens", prompts, 200)


def _write_llama3_tokenizer(folder: Path, tokenizer_from: Path) -> None:
    begin = "<|begin_of_text|>"
    tokenizer = plain_tokenizer(tokenizer_from)
    tokenizer.add_special_tokens([begin])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": begin, "eos_token": begin, "pad_token": begin, "padding_side": "left"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write(folder / "tokenizer_config.json", {**named, **kind, "model_max_length": 256})


def write_gemma_tokenizer(folder: Path, *, ends: bool) -> None:
    """Gemma's own class, with bytes for what the corpus has no characters for.

    Args:
        ends: whether texts end with <eos>, as EmbeddingGemma's do.
    """
    merges: Any = list(GEMMA_MERGES)
    tokenizer = GemmaTokenizer(
        vocab=gemma_vocabulary(), merges=merges, add_bos_token=True, add_eos_token=ends, model_max_length=2048
    )
    tokenizer.save_pretrained(folder)


@lru_cache(maxsize=1)
def gemma_vocabulary() -> dict[str, int]:
    """Gemma's special tokens first, then bytes, characters and what its merges make."""
    characters = sorted({character for line in CORPUS for character in line} - {" "} | {"▁"})
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    pieces += [first + second for first, second in GEMMA_MERGES]
    return {piece: index for index, piece in enumerate(pieces)}


def tiny_modernbert(
    folder: Path,
    tokenizer_from: Path,
    *,
    reranker: bool = False,
    pooling: str = "cls_token",
    seed: int = 0,
    **keys: Any,
) -> Path:
    """A five-layer ModernBERT of 32 dimensions with the bundled model's tokenizer and the hub's config keys.

    Its windows are short, so that texts of some tokens are longer. `keys` change config.json.
    """
    torch.manual_seed(seed)
    config = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5},
        **{"num_attention_heads": 4, "max_position_embeddings": 128, "local_attention": 8, "norm_eps": 1e-5},
        **{"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
        **{"norm_bias": False, "mlp_bias": False, "attention_bias": False, "classifier_bias": False},
        **{"hidden_activation": "gelu", "classifier_activation": "gelu", "classifier_pooling": "mean"},
        **{"pad_token_id": 0, "bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102, "sep_token_id": 102},
        **keys,
    }
    own = {"initializer_range": 0.3, **({"num_labels": 1} if reranker else {})}
    model_class: Any = ModernBertForSequenceClassification if reranker else ModernBertModel
    model = model_class(ModernBertConfig(**deepcopy(config), **own))
    _randomize_vectors(model)
    model.save_pretrained(folder)
    unread = {
        **{"layer_norm_eps": 1e-5, "position_embedding_type": "absolute", "decoder_bias": True, "mlp_dropout": 0.0},
        **{"initializer_cutoff_factor": 2.0, "embedding_dropout": 0.0, "deterministic_flash_attn": False},
        **{"sparse_prediction": False, "sparse_pred_ignore_index": -100, "reference_compile": None},
        **{"architectures": [model_class.__name__], "model_type": "modernbert", "torch_dtype": "float32"},
        **({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if reranker else {}),
    }
    write(folder / "config.json", {**config, **unread})
    copy_tokenizer(tokenizer_from, folder)
    names = ["input_ids", "attention_mask"]
    edit_json(folder / "tokenizer_config.json", model_max_length=128, model_input_names=names)
    return folder if reranker else _as_sentence_transformer(folder, ["Transformer", "Pooling"], pooling, None, 128)


def tiny_static(
    folder: Path, tokenizer_from: Path, *, within: str = "", normalize: bool = False, seed: int = 0
) -> Path:
    """A StaticEmbedding of 16 dimensions with the bundled model's tokenizer.json, as sentence-transformers saves it.

    `within`: the folder that releases before 5 gave it.
    """
    (folder / within).mkdir(parents=True, exist_ok=True)
    table = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(seed))
    save_file({"embedding.weight": table}, folder / within / "model.safetensors")
    tokenizer = Tokenizer.from_str(shortened(tokenizer_from / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.save(str(folder / within / "tokenizer.json"))
    entries = [("StaticEmbedding", within), *([("Normalize", "1_Normalize")] if normalize else [])]
    types = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(entries)
    ]
    (folder / "1_Normalize").mkdir(exist_ok=True)
    write(folder / "modules.json", types)
    return folder


def add_heads(folder: Path, *heads: dict[str, Any]) -> Path:
    """Write modules.json: the transformer, then these with their folders, the pooling first unless it is among them."""
    pooling = [] if any(head["kind"] == "Pooling" for head in heads) else [{"kind": "Pooling"}]
    entries = []
    for number, head in enumerate([{"kind": "Transformer"}, *pooling, *heads]):
        path = {"Transformer": "", "Pooling": "1_Pooling"}.get(head["kind"], f"{number}_{head['kind']}")
        kind = f"sentence_transformers.models.{head['kind']}"
        entries.append({"idx": number, "name": str(number), "path": path, "type": kind})
        if head["kind"] not in ("Transformer", "Pooling"):
            tiny_head(folder / path, **head, seed=number)
    write(folder / "modules.json", entries)
    return folder


def dense(in_features: int, out_features: int, **config: Any) -> dict[str, Any]:
    """A Dense for `add_heads`."""
    return {"kind": "Dense", "in_features": in_features, "out_features": out_features, **config}


def scores(in_features: int = 32, out_features: int = 1, **config: Any) -> dict[str, Any]:
    """The Dense that ends a cross-encoder of several modules."""
    identity = "torch.nn.modules.linear.Identity"
    names = {"module_input_name": "sentence_embedding", "module_output_name": "scores"}
    return dense(in_features, out_features, **{"activation_function": identity, **names, **config})


def score_vectors(folder: Path, *heads: dict[str, Any], **library: Any) -> Path:
    """Make an embedder's folder one of a cross-encoder that scores its vectors with these heads.

    `library` changes config_sentence_transformers.json.
    """
    add_heads(folder, *heads)
    own = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    write(folder / "config_sentence_transformers.json", {**own, **library})
    module = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    edit_json(folder / "sentence_bert_config.json", **module, modality_config={"text": FORWARD})
    return folder


def tiny_head(folder: Path, *, kind: str, seed: int = 0, **config: Any) -> None:
    """The folder of a Dense, LayerNorm or Normalize of sentence-transformers, with random weights."""
    write(folder / "config.json", config)
    generator = torch.Generator().manual_seed(seed)
    if kind == "LayerNorm":
        width = config["dimension"]
        weights = {f"norm.{leaf}": torch.randn(width, generator=generator) for leaf in ("weight", "bias")}
    elif kind == "Dense":
        shape = config["out_features"], config["in_features"]
        weights = {"linear.weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5}
        if config.get("bias", True):
            weights["linear.bias"] = torch.randn(shape[0], generator=generator)
        if config.get("use_residual") and shape[0] != shape[1]:
            weights["residual.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        if config.get("activation_function", "").endswith(".PReLU"):
            weights["activation_function.weight"] = torch.tensor([0.3])
    else:
        return
    save_file(weights, folder / "model.safetensors")


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


def _nomic_mixture_weights(
    width: int, inner: int, layers: int, experts: int, vocab: int, seed: int
) -> dict[str, torch.Tensor]:
    """Random weights under the names of the hub's file. The first dimensions, of which there are as many as experts,
    hardly change from the embedding to the last router, which reads them."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, width),
        "embeddings.token_type_embeddings.weight": (1, width),
    }
    norms, written = ["emb_ln"], []
    for number in range(layers):
        layer = f"encoder.layers.{number}"
        linear = {"attn.Wqkv": (3 * width, width), "attn.out_proj": (width, width)}
        if number % 2:
            shapes |= {f"{layer}.mlp.experts.mlp.{name}": (experts * inner, width) for name in ("w1", "w2")}
            shapes |= {f"{layer}.mlp.router.layer.weight": (experts, width), f"{layer}.mlp.experts.bias": (width,)}
        else:
            linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in linear.items()}
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        written += [f"{layer}.{name}" for name in ("attn.out_proj.weight", "attn.out_proj.bias", "mlp.fc2.weight")]
        written += [f"{layer}.{name}" for name in ("mlp.fc2.bias", "mlp.experts.bias")]
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {f"{norm}.weight": 1 + 0.1 * torch.randn(width, generator=generator) for norm in norms}
    weights |= {f"{norm}.bias": 0.1 * torch.randn(width, generator=generator) for norm in norms}
    steady = {name: (weights[name][:experts], 0.0) for name in written if name in weights}
    steady |= {f"{norm}.weight": (weights[f"{norm}.weight"][:experts], 1.0) for norm in norms}
    steady |= {f"{norm}.bias": (weights[f"{norm}.bias"][:experts], 0.0) for norm in norms}
    steady |= {name: (each[:, :experts], 0.0) for name, each in weights.items() if name.endswith(".w2")}
    for part, value in steady.values():
        part.mul_(0.01).add_(0.99 * value)
    for router in (each for name, each in weights.items() if name.endswith("router.layer.weight")):
        router.mul_(0.01).add_(torch.eye(experts, width))
    orders = torch.rand(vocab, experts, generator=generator).argsort(dim=1)
    weights["embeddings.word_embeddings.weight"][:, :experts] = orders.float() - 1.5
    weights["embeddings.token_type_embeddings.weight"].mul_(0.1)
    return weights


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer of another checkpoint, shortened."""
    (folder / "tokenizer.json").write_text(shortened(source / "tokenizer.json"), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    if (source / "vocab.txt").is_file():
        words = (source / "vocab.txt").read_text("utf-8").split("\n")
        (folder / "vocab.txt").write_text("\n".join(words[:VOCAB]), "utf-8")


@lru_cache
def shortened(file: Path) -> str:
    """A tokenizer.json with at most VOCAB words of a WordPiece vocabulary."""
    definition = json.loads(file.read_text("utf-8"))
    if definition["model"]["type"] == "WordPiece":
        words = definition["model"]["vocab"]
        definition["model"]["vocab"] = {word: number for word, number in words.items() if number < VOCAB}
    return json.dumps(definition)


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
    copy_tokenizer(tokenizer_from, folder)
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
