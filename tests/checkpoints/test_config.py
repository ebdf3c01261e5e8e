"""Keys of config.json: what each says is in the vectors, or the checkpoint is refused by the key's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GenerationConfig,
    MistralConfig,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedConfig,
    Qwen3Config,
    XLMRobertaConfig,
)
from transformers.activations import ACT2CLS

from tests.checkpoints import variants
from tests.checkpoints.variants import TOLERANCE, Served, Variant, served
from tests.oracle import nomic_encode
from tests.tiny_checkpoints import VOCAB, edit_json, tiny_bert, tiny_cross_encoder, tiny_nomic, tiny_xlm_roberta
from vecmill.core.types import Task
from vecmill.models.checkpoint import read
from vecmill.models.config_keys import ACTIVATIONS
from vecmill.models.families import FAMILIES
from vecmill.models.families import nv_embed as nv_embed_spec
from vecmill.models.keys import Rule
from vecmill.models.source import find

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLED = find("auto").folder


# As https://huggingface.co/Qwen/Qwen3-Reranker-0.6B renders a pair; the last line break is dropped by Jinja.
CHAT_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\n"
)


def bert(folder: Path) -> None:
    tiny_bert(folder, BUNDLED)


def xlm_roberta(folder: Path) -> None:
    tiny_xlm_roberta(folder)


def nomic(folder: Path) -> None:
    tiny_nomic(folder, BUNDLED)


def bare_nomic(folder: Path) -> None:
    nomic(folder)
    (folder / "modules.json").unlink()


def native_nomic(folder: Path) -> None:
    """As transformers 5 writes it; the weights are random, the other files those of the hub's layout."""
    tiny_nomic(folder, BUNDLED)
    config = NomicBertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    torch.manual_seed(0)
    NomicBertModel(config).save_pretrained(folder)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=128)


def golden(*parts: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copytree(GOLDEN.joinpath(*parts), folder, dirs_exist_ok=True)

    return copy


def cross_encoder(folder: Path) -> None:
    tiny_cross_encoder(folder, kind="bert", tokenizer_from=BUNDLED)


def xlm_cross_encoder(folder: Path) -> None:
    tiny_cross_encoder(folder, kind="xlm-roberta")


qwen3 = golden("qwen3", "embedding")


def qwen3_reranker(folder: Path) -> None:
    """With the template that the hub's files have, which sentence-transformers needs."""
    golden("qwen3", "reranker")(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


nv_embed = golden("nvembed", "checkpoint")


def config(**keys: Any) -> Callable[[Path], None]:
    """Set keys of config.json."""
    return lambda folder: edit_json(folder / "config.json", **keys)


def within(part: str, **keys: Any) -> Callable[[Path], None]:
    """Set keys of an object in config.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        edit_json(folder / "config.json", **{part: {**content[part], **keys}})

    return change


def without(*keys: str) -> Callable[[Path], None]:
    """Remove keys of config.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(
            json.dumps({key: content[key] for key in content if key not in keys}), "utf-8"
        )

    return change


# What the hub's files of these models hold, but for the sizes.
CLASSIC = {
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.02,
    "label2id": {"LABEL_0": 0},
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "use_cache": True,
}
CHINESE = {
    **CLASSIC,
    "directionality": "bidi",
    "output_past": True,
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}
MULTILINGUAL = {**CLASSIC, "layer_norm_eps": 1e-5, "output_past": True, "bos_token_id": 0, "eos_token_id": 2}
NOMIC = {
    "bos_token_id": None,
    "dense_seq_output": True,
    "eos_token_id": None,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "reorder_and_upcast_attn": False,
    "summary_activation": None,
    "summary_first_dropout": 0.0,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "transformers_version": "4.37.2",
    "use_cache": True,
    "use_flash_attn": True,
    "use_xentropy": True,
}
NATIVE_NOMIC = {  # since 2026 the hub's file has both kinds of keys
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
    "dtype": "float32",
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
}
QWEN3 = {
    "_name_or_path": "Qwen/Qwen3-0.6B-Base",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rope_scaling": None,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.2",
    "use_cache": False,
    "use_sliding_window": False,
}
QWEN3_5X = {  # as transformers 5 writes it
    **{key: value for key, value in QWEN3.items() if key not in ("rope_scaling", "torch_dtype")},
    "dtype": "bfloat16",
    "layer_types": ["full_attention", "full_attention"],
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}
GENERATION = {  # of transformers 4.42
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}

LIBRARIES = {  # what other releases and libraries leave in a file
    "_attn_implementation": "eager",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "attn_implementation": "sdpa",
    "cell": {},
    "emb_size": 312,
    "pre_trained": "",
    "structure": [],
    "training": "",
    "transformers.js_config": {"dtype": "q8"},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"rope_type": "longrope", "long_factor": [3.0] * 8, "short_factor": [1.5] * 8}
NO_ALIBI = 'config.json has `position_embedding_type`: "alibi"; supported: "absolute", null'
REMOTE = "code of its own, and no remote code is run"
JINA_V2 = {
    "architectures": ["JinaBertForMaskedLM"],
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "emb_pooler": "mean",
    "feed_forward_type": "geglu",
    "position_embedding_type": "alibi",
}
JINA_WITHOUT_TASKS = {
    "auto_map": {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_xlm_roberta.XLMRobertaModel"},
    "architectures": ["XLMRobertaModel"],
    "position_embedding_type": "rotary",
}
JINA_V3 = {**JINA_WITHOUT_TASKS, "lora_adaptations": ["retrieval.query"]}


# How control tokens in texts are read is no matter of config.json.
TEXTS = tuple(text for text in variants.TEXTS if "<pad>" not in text)
DOCUMENTS = tuple(text for text in variants.DOCUMENTS if "<pad>" not in text)


def embeds(
    name: str, base: Callable[[Path], Any], change: Callable[[Path], Any], refused: str | None = None
) -> Variant:
    return Variant(name, base, change, refused, texts=TEXTS)


def reranks(
    name: str, base: Callable[[Path], Any], change: Callable[[Path], Any], refused: str | None = None
) -> Variant:
    return Variant(name, base, change, refused, rerank=True, documents=DOCUMENTS)


def biases(folder: Path) -> None:
    """Qwen3's projections of attention have biases too."""
    file = folder / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith("_proj.weight") and "self_attn" in name]:
        bias = torch.randn(len(weights[name]), generator=generator)
        weights[name.replace(".weight", ".bias")] = bias.to(weights[name].dtype)
    save_file(weights, file, metadata={"format": "pt"})
    config(attention_bias=True)(folder)


def nomic_of_2026(folder: Path) -> None:
    nomic(folder)
    config(**NATIVE_NOMIC)(folder)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=128)


def implied_theta(folder: Path) -> None:
    """Rotary parameters that leave out what the hub's key says."""
    config(rotary_emb_base=7, rope_parameters={"rope_type": "linear", "factor": 4.0})(folder)


WINDOWED = ["sliding_attention", "full_attention"]
SLIDING = {"use_sliding_window": True, "sliding_window": 4}

VARIANTS = [
    # As the hub has them.
    embeds("bge-en", bert, config(**CLASSIC)),
    embeds("bge-zh", bert, config(**CHINESE)),
    embeds("e5", xlm_roberta, config(**MULTILINGUAL)),
    embeds("qwen3-embedding", qwen3, config(**QWEN3)),
    embeds("qwen3-by-transformers-5", qwen3, config(**QWEN3_5X)),
    embeds("every-old-key", bert, config(**GENERATION)),
    reranks("ms-marco", cross_encoder, config(**CLASSIC, sbert_ce_default_activation_function="torch.nn.Identity")),
    reranks("bge-reranker", xlm_cross_encoder, config(**MULTILINGUAL)),
    reranks("qwen3-reranker", qwen3_reranker, config(**QWEN3)),
    # Honoured.
    *(embeds(f"bert-{name}", bert, config(hidden_act=name)) for name in ("relu", "gelu_new", "silu", "tanh", "relu2")),
    embeds("bert-eps", bert, config(layer_norm_eps=0.1)),
    embeds("xlm-eps", xlm_roberta, config(layer_norm_eps=0.1, hidden_act="gelu_fast")),
    embeds("heads", bert, config(num_attention_heads=8)),
    embeds("outputs", bert, config(output_hidden_states=True, output_attentions=True, return_dict=False)),
    embeds("made-from-a-reranker", bert, config(sentence_transformers={"version": "5.0.0"}, num_labels=1)),
    embeds("bert-half", bert, config(dtype="float16")),
    embeds("of-other-libraries", bert, config(**LIBRARIES)),
    embeds("padding", bert, config(pad_token_id=None)),
    embeds("qwen3-act", qwen3, config(hidden_act="gelu_pytorch_tanh", rms_norm_eps=0.1)),
    embeds("qwen3-bias", qwen3, biases),
    embeds("qwen3-theta", qwen3, config(rope_theta=100)),
    embeds("qwen3-parameters", qwen3, config(rope_parameters={"rope_type": "default", "rope_theta": 50.0})),
    embeds("qwen3-linear", qwen3, config(rope_scaling={"type": "linear", "factor": 4.0})),
    embeds("qwen3-yarn", qwen3, config(rope_scaling=YARN)),
    embeds("qwen3-llama3", qwen3, config(rope_scaling=LLAMA3)),
    embeds("qwen3-dynamic", qwen3, config(rope_scaling={"rope_type": "dynamic", "factor": 4.0})),
    embeds("qwen3-longrope", qwen3, config(rope_scaling=LONGROPE)),
    embeds("qwen3-window-unused", qwen3, config(sliding_window=8, max_window_layers=0)),
    embeds("qwen3-window", qwen3, config(**SLIDING, max_window_layers=1)),
    embeds("qwen3-window-of-all-layers", qwen3, config(**SLIDING, max_window_layers=0)),
    embeds("qwen3-window-by-layer", qwen3, config(**SLIDING, layer_types=WINDOWED)),
    embeds("qwen3-window-of-no-layer", qwen3, config(use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    embeds("nomic-of-2026", nomic_of_2026, config(**NOMIC)),
    embeds("nomic-of-2026-linear", nomic_of_2026, config(rope_parameters={"rope_type": "linear", "factor": 4.0})),
    embeds("native-nomic", native_nomic, config()),
    embeds("native-nomic-theta", native_nomic, config(rope_parameters={"rope_type": "default", "rope_theta": 7.0})),
    embeds("native-nomic-linear", native_nomic, config(rope_parameters={"rope_type": "linear", "factor": 4.0})),
    embeds("native-nomic-act", native_nomic, config(hidden_act="gelu", layer_norm_eps=0.1)),
    reranks("ce-act", cross_encoder, config(hidden_act="relu", layer_norm_eps=0.01)),
    reranks("qwen3-reranker-window", qwen3_reranker, config(**SLIDING, max_window_layers=1)),
    reranks("qwen3-reranker-yarn", qwen3_reranker, config(rope_scaling=YARN, hidden_act="gelu")),
    # Refused.
    embeds("jina-v2-with-berts-weights", bert, config(**JINA_V2), "the weights do not fit JinaBert: "),
    embeds("jina-without-tasks", xlm_roberta, config(**JINA_WITHOUT_TASKS), REMOTE),
    embeds("jina-v3-in-part", xlm_roberta, config(**JINA_V3), "leaves out `load_trained_adapters`"),
    embeds("alibi", bert, config(position_embedding_type="alibi"), NO_ALIBI),
    embeds("relative", xlm_roberta, config(position_embedding_type="relative_key"), "`position_embedding_type`"),
    embeds("unknown", bert, config(surprise=1), "the key `surprise` (1), which is not known here"),
    embeds("half-a-pair", bert, config(**{"\ud800": "\udfff"}), 'the key `\\ud800` ("\\udfff")'),
    embeds("nested-too-deep", bert, lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not valid"),
    embeds("unknown-text", bert, config(surprise="x" * 500), "`surprise`"),
    embeds("act", bert, config(hidden_act="geglu"), '`hidden_act`: "geglu"; supported: "gelu", '),
    embeds("act-with-weights", bert, config(hidden_act="prelu"), '`hidden_act`: "prelu"'),
    embeds("decoder", bert, config(is_decoder=True), "`is_decoder`: true; supported: false"),
    embeds("cross-attention", bert, config(add_cross_attention=True), "`add_cross_attention`"),
    embeds("encoder-decoder", bert, config(is_encoder_decoder=True), "`is_encoder_decoder`"),
    embeds("chunked", bert, config(chunk_size_feed_forward=7), "`chunk_size_feed_forward`: 7; supported: 0"),
    embeds("chunked-null", bert, config(chunk_size_feed_forward=None), "`chunk_size_feed_forward`: null; supported: 0"),
    embeds("pruned", bert, config(pruned_heads={"0": [1]}), '`pruned_heads`: {"0": [1]}'),
    embeds("quantized", bert, config(quantization_config={"bits": 4}), "`quantization_config`"),
    embeds("quantized-by-mlx", bert, config(quantization={"bits": 4}), "`quantization`"),
    embeds("foreign-class", bert, config(architectures=["OtherBert"]), "`architectures`"),
    embeds("no-list", bert, config(architectures=5), "`architectures`: 5"),
    embeds("text-for-a-number", bert, config(hidden_size="32"), '`hidden_size`: "32"; supported: a whole number'),
    embeds(
        "no-number", bert, config(layer_norm_eps=float("nan")), "`layer_norm_eps`: NaN; supported: a number above 0"
    ),
    embeds("truth-for-a-number", bert, config(num_hidden_layers=True), "`num_hidden_layers`: true"),
    embeds("heads-that-do-not-divide", bert, config(num_attention_heads=5), "config.json cannot be right"),
    embeds("fewer-layers", bert, config(num_hidden_layers=1), "unknown"),
    embeds("one-type", bert, config(type_vocab_size=1), "token_type_embeddings.weight has the shape"),
    embeds(
        "no-padding", xlm_roberta, config(pad_token_id=None), "`pad_token_id`: null; supported: a whole number from 0"
    ),
    embeds("no-positions", bert, without("max_position_embeddings"), "how many positions"),
    embeds("not-an-object", bert, lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
    embeds("not-json", bert, lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    embeds(
        "not-an-object-of-a-module",
        bert,
        lambda folder: (folder / "1_Pooling" / "config.json").write_text("[]"),
        "1_Pooling/config.json holds no JSON object",
    ),
    embeds("per-layer", qwen3, config(per_layer_config={"0": {"hidden_act": "relu"}}), "`per_layer_config`"),
    embeds("both-ways", qwen3, config(is_causal=False), "`is_causal`: false"),
    embeds("both-ways-by-null", qwen3, config(is_causal=None), "`is_causal`: null; supported: true"),
    embeds("window-not-used", qwen3, config(layer_types=WINDOWED), "`use_sliding_window`"),
    embeds(
        "window-of-none",
        qwen3,
        config(use_sliding_window=True, layer_types=WINDOWED, sliding_window=0),
        "`sliding_window`: 0",
    ),
    embeds("window-without", qwen3, config(use_sliding_window=True, layer_types=WINDOWED), "`sliding_window`: null"),
    embeds("chunks", qwen3, config(layer_types=["full_attention", "chunked_attention"]), "`layer_types`"),
    embeds(
        "longrope", qwen3, config(rope_scaling={**LONGROPE, "original_max_position_embeddings": 64}), "at 64 tokens"
    ),
    embeds("rope", qwen3, config(rope_scaling={"rope_type": "su", "factor": 2}), '`rope_scaling.rope_type`: "su"'),
    embeds("rope-key", qwen3, config(rope_parameters={"mrope_section": [4, 2, 2]}), "`rope_parameters.mrope_section`"),
    embeds("rope-by-layer", qwen3, config(rope_parameters={"full_attention": {}}), "`rope_parameters.full_attention`"),
    embeds("rope-number", qwen3, config(rope_scaling=3), "rope_scaling in"),
    embeds("rope-partly", qwen3, config(partial_rotary_factor=0.5), "`partial_rotary_factor`: 0.5"),
    embeds(
        "yarn-without-factor",
        qwen3,
        config(rope_scaling={"rope_type": "yarn"}),
        "Missing required keys in `rope_parameters`",
    ),
    embeds("bias", qwen3, config(attention_bias=True), "missing"),
    embeds("head-dim", qwen3, config(head_dim=8), "has the shape"),
    embeds("kv-heads", qwen3, config(num_key_value_heads=4), "has the shape"),
    embeds("native-nomic-partly", native_nomic, config(partial_rotary_factor=0.5), "`partial_rotary_factor`"),
    *(
        embeds(f"nomic-{key}", nomic, config(**{key: value}), f"config.json has `{key}`")
        for key, value in {
            "activation_function": "gelu_new",
            "causal": True,
            "num_experts": 8,
            "parallel_block": True,
            "prenorm": True,
            "reorder_and_upcast_attn": True,
            "rotary_emb_fraction": 0.5,
            "rotary_emb_interleaved": True,
            "rotary_emb_scale_base": 512,
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": False,
            "use_rms_norm": True,
        }.items()
    ),
    embeds("nomic-no-theta", nomic, without("rotary_emb_base"), "leaves out `rotary_emb_base`"),
    embeds(
        "nomic-both", nomic, config(hidden_size=768), "has `n_embd` (32) and `hidden_size` (768), which do not agree"
    ),
    embeds(
        "nomic-scaled", nomic, config(rope_scaling={"type": "linear", "factor": 2}), "null beside `rotary_emb_base`"
    ),
    embeds("nomic-both-thetas", nomic, config(rope_parameters={"rope_theta": 10.0}), "`rotary_emb_base` (1000)"),
    embeds("nomic-implied-theta", nomic_of_2026, implied_theta, "`rotary_emb_base` (7) and `rope_theta` (1000.0)"),
    embeds("native-nomic-base", native_nomic, config(rotary_emb_base=7), "`rotary_emb_base` (7) and `rope_theta`"),
    embeds("nomic-code", nomic, config(auto_map={"AutoModel": "someone/else--modeling_x.NomicBertModel"}), REMOTE),
    embeds("nv-eos", nv_embed, config(add_eos=False), "`add_eos`: false; supported: true"),
    embeds("nv-side", nv_embed, config(padding_side="left"), '`padding_side`: "left"; supported: "right"'),
    embeds("nv-mask", nv_embed, config(mask_type="c"), "`mask_type`"),
    embeds("nv-code", nv_embed, config(auto_map={"AutoModel": "modeling_other.Model"}), REMOTE),
    embeds("nv-text", nv_embed, within("text_config", attention_bias=True), "`text_config.attention_bias`"),
    embeds("nv-rope", nv_embed, within("text_config", rope_scaling={"type": "linear"}), "`text_config.rope_scaling`"),
    embeds("nv-type", nv_embed, within("text_config", model_type="llama"), "`text_config.model_type`"),
    embeds("nv-no-text", nv_embed, config(text_config=None), "text_config in"),
    embeds("nv-heads", nv_embed, within("latent_attention_config", num_cross_heads=4), "the weights one of 256"),
    embeds("nv-latents", nv_embed, within("latent_attention_config", num_latents_value=4), "the weights one of 8"),
    embeds(
        "nv-length", nv_embed, within("latent_attention_config", output_normalize=False), "config.output_normalize`"
    ),
    reranks("three-labels", cross_encoder, config(id2label={"0": "a", "1": "b", "2": "c"}), "supported: one label"),
    reranks("no-head", cross_encoder, config(architectures=["BertModel"]), "have no head that scores a pair"),
    reranks("ce-alibi", cross_encoder, config(position_embedding_type="alibi"), NO_ALIBI),
    reranks("qwen3-reranker-chunks", qwen3_reranker, config(layer_types=["chunked_attention"] * 2), "`layer_types`"),
    reranks("a-family-without-rerankers", bare_nomic, config(), "'nomic_bert' is not supported"),
]
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]
# Without a reference that reads them: the same vectors as the base's.
HARMLESS = [
    (
        Variant("nv-embed", nv_embed),
        Variant("nv-embed-of-the-hub", nv_embed, within("text_config", **GENERATION, sliding_window=4)),
    ),
]
NOMICS = [
    Variant("nomic-of-the-hub", nomic, config(**NOMIC)),
    Variant("nomic-theta", nomic, config(rotary_emb_base=7)),
    Variant("nomic-eps", nomic, config(layer_norm_epsilon=0.1)),
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    pairs = [variant for pair in HARMLESS for variant in pair]
    async with served([*VARIANTS, *NOMICS, *pairs], tmp_path_factory.mktemp("variants")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


@pytest.mark.parametrize("variant", NOMICS, ids=str)
async def test_the_hubs_keys_of_nomic(server: Served, variant: Variant) -> None:
    """transformers reads the native keys alone: they are translated for it."""
    expected = nomic_encode(server.folders[variant.name], variant.texts)
    np.testing.assert_allclose(await server.vectors(variant), expected, atol=TOLERANCE, rtol=0)


def test_nomic_is_cut_where_its_code_takes_it_to_be_trained(tmp_path: Path) -> None:
    folder = Variant("nomic", nomic, without("max_trained_positions")).write(tmp_path)
    edit_json(folder / "config.json", n_positions=8192)
    assert read(find(str(folder))).positions == 2048


@pytest.mark.parametrize(("base", "variant"), HARMLESS, ids=str)
async def test_what_changes_nothing(server: Served, base: Variant, variant: Variant) -> None:
    np.testing.assert_allclose(await server.vectors(variant), await server.vectors(base), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("keys", "config_class"),
    [
        (FAMILIES["bert"].tasks[Task.EMBED].keys, BertConfig),
        (FAMILIES["xlm-roberta"].tasks[Task.EMBED].keys, XLMRobertaConfig),
        (FAMILIES["nomic_bert"].tasks[Task.EMBED].keys, NomicBertConfig),
        (FAMILIES["qwen3"].tasks[Task.EMBED].keys, Qwen3Config),
        (FAMILIES["qwen3"].tasks[Task.RERANK].keys, Qwen3Config),
        (nv_embed_spec.TEXT, MistralConfig),
    ],
)
def test_every_key_of_transformers_classes_is_known(
    keys: dict[str, Rule], config_class: type[PreTrainedConfig]
) -> None:
    """A release that adds one is noticed here, and what it writes by itself is accepted."""
    written = config_class().to_dict()
    assert set(written) <= set(keys)
    # The window that the class writes of itself is one that no layer uses.
    assert all(keys[key].accepts(value) for key, value in written.items() if key != "model_type")


def test_the_activations_are_all_that_have_no_weights() -> None:
    assert set(ACTIVATIONS) == set(ACT2CLS) - {"prelu", "xielu"}


def test_the_keys_of_generation_are_harmless() -> None:
    """transformers drops them from a model's configuration."""
    old = {"bos_token_id", "eos_token_id", "max_length", "num_beams", "top_k", "temperature", "do_sample"}
    assert old <= set(GenerationConfig._get_default_generation_params()) | {"bos_token_id", "eos_token_id"}
