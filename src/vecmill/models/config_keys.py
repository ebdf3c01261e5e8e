"""What config.json may say in each family: every key that is read, and those that change nothing. Reads no tensors.

A key that no table lists is refused: transformers keeps what it does not know, and another release, or a class of its
own, may read it. Checked before weights are fetched, so nothing here imports torch.

Sources: the configuration classes of transformers 5 and the keys that its 4.x releases wrote; for nomic and NV-Embed
the code that their files were made with (https://huggingface.co/nomic-ai/nomic-bert-2048,
https://huggingface.co/nvidia/NV-Embed-v2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.keys import (
    HARMLESS,
    HONOURED,
    Rule,
    check_keys,
    honoured,
    only,
    positive,
    rules,
    unsupported,
    whole,
)

# The activations of transformers that have no weights of their own.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)
TRAINING = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "finetuning_task",
    "fused_bias_fc",
    "fused_dropout_add_ln",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "initializer_factor",
    "initializer_range",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "use_xentropy",
)
GENERATION = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
)
OF_RERANKERS = ("classifier_from_token", "is_original_qwen3_reranker")  # vLLM's, of language models that score
LABELS = ("_num_labels", "id2label", "label2id", "num_labels", "problem_type")
BOOKKEEPING = (
    "_attn_implementation",  # how attention is computed, and not what
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "attn_implementation",
    "directionality",
    "dtype",  # of the files; DTYPE says what it is run in
    "language",
    "license",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "return_dict",
    "sep_token_id",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",  # the tokenizer is tokenizer.json whatever class it has
    "torch_dtype",
    "torchscript",
    "transformers.js_config",  # what that library loads
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_return_dict",
    "xla_device",
)
QUANTIZED = "Name the checkpoint that it was made of: weights are loaded as they were trained."
REMOTE_CODE = "The model needs code of its own, and no remote code is run: serve it with sentence-transformers."

# More are no model's, and would only take memory before the weights show that they do not fit.
MOST_LAYERS, MOST_POSITIONS = 1000, 10_000_000


def _are_sizes(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(whole().accepts(size) for size in value))


SIZES = Rule(_are_sizes, "a list of whole numbers, null")

COMMON: Mapping[str, Rule] = {
    **rules(HARMLESS, (*TRAINING, *GENERATION, *BOOKKEEPING)),
    **rules(HONOURED, ("_name_or_path", "model_type")),
    "is_matryoshka": only(False, True, None),
    "matryoshka_dimensions": SIZES,
    "architectures": HONOURED,  # see `_check_architectures`
    "auto_map": only(None, cure=REMOTE_CODE),
    "add_cross_attention": only(False, None),
    "chunk_size_feed_forward": only(0, cure="Set it to 0: it saves memory in training and changes no value."),
    "is_decoder": only(False, None),
    "is_encoder_decoder": only(False, None),
    "pruned_heads": only({}, None),
    **rules(only(None, cure=QUANTIZED), ("quantization", "quantization_config")),  # the former is MLX's
    "tie_word_embeddings": HARMLESS,
    "hidden_act": only(*ACTIVATIONS),
    "hidden_size": whole(),
    "intermediate_size": whole(),
    "max_position_embeddings": whole(largest=MOST_POSITIONS),
    "num_attention_heads": whole(),
    "num_hidden_layers": whole(largest=MOST_LAYERS),
    "vocab_size": whole(),
}
# Of Google's releases and of TinyBERT's; read by nothing.
OF_RELEASES = (
    *(f"pooler_{part}" for part in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")),
    *("cell", "emb_size", "pre_trained", "structure", "training"),
)
BERT: Mapping[str, Rule] = {
    **COMMON,
    **rules(HARMLESS, OF_RELEASES),
    "layer_norm_eps": positive(),
    "pad_token_id": whole(0, null=True),
    "position_embedding_type": only("absolute", None, cure="Its positions (ALiBi, relative) are not implemented."),
    "type_vocab_size": whole(),
}
XLM_ROBERTA: Mapping[str, Rule] = {**BERT, "pad_token_id": whole(0)}  # positions are counted from it

ROPE: Mapping[str, Rule] = {
    "rope_type": only("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
    "type": only("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
    "rope_theta": positive(),
    "partial_rotary_factor": only(1.0, None),
    **rules(positive(null=True), ("attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor")),
    **rules(positive(null=True), ("low_freq_factor", "mscale", "mscale_all_dim")),
    **rules(HONOURED, ("long_factor", "short_factor", "truncate")),
    "original_max_position_embeddings": whole(null=True),
}
ROTARY: Mapping[str, Rule] = {
    "rope_parameters": HONOURED,  # with `rope_scaling`, see `_check_rope`
    "rope_scaling": HONOURED,
    "rope_theta": positive(),
    "partial_rotary_factor": only(1.0, None),
    "head_dim": whole(null=True),
    "pad_token_id": whole(0, null=True),
}
QWEN3: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "attention_bias": only(False, True),
    "head_dim": whole(),
    "is_causal": only(True, cure="A Qwen3 that looks both ways, as null makes it too, is not implemented."),
    "layer_types": HONOURED,  # with the next three, see `_check_sliding_window`
    "max_window_layers": whole(0),
    "sliding_window": whole(null=True),
    "use_sliding_window": only(False, True),
    "num_key_value_heads": whole(null=True),
    "rms_norm_eps": positive(),
}
NOMIC_CODE = r"(nomic-ai/nomic-bert-2048--)?(configuration|modeling)_hf_nomic_bert\.NomicBert\w+"
NOMIC_BERT: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "auto_map": Rule(
        lambda value: value is None or _all_match(value, NOMIC_CODE), "nomic-ai/nomic-bert-2048's classes", REMOTE_CODE
    ),
    "layer_norm_eps": positive(),
    "pad_token_id": whole(0),
    "type_vocab_size": whole(),
    # The keys of the code that the hub's files were made with, where the native class has others or none.
    "n_embd": whole(),
    "n_head": whole(),
    "n_inner": whole(),
    "n_layer": whole(largest=MOST_LAYERS),
    "n_positions": whole(largest=MOST_POSITIONS),
    "max_trained_positions": whole(largest=MOST_POSITIONS),
    "layer_norm_epsilon": positive(),
    "rotary_emb_base": positive(),
    "activation_function": only("swiglu"),
    "causal": only(False),
    "ffn_div": HARMLESS,  # of experts
    "mlp_fc1_bias": only(False),
    "mlp_fc2_bias": only(False),
    "num_experts": only(0, None, cure="A mixture of experts (nomic-embed-text-v2-moe) is not implemented."),
    "moe_every_n_layers": only(0, None),
    "parallel_block": only(False),
    "parallel_block_tied_norm": HARMLESS,  # of parallel blocks
    "prenorm": only(False),
    "qkv_proj_bias": only(False),
    "reorder_and_upcast_attn": only(False),
    "rotary_emb_fraction": only(1.0),
    "rotary_emb_interleaved": only(False),
    "rotary_emb_scale_base": only(None),
    "rotary_scaling_factor": HARMLESS,  # beyond the positions it was trained on, where texts are cut
    "scale_attn_by_inverse_layer_idx": only(False),
    "scale_attn_weights": only(True),
    "use_rms_norm": only(False),
    **rules(HARMLESS, ("dense_seq_output", "pad_vocab_size_multiple", "use_flash_attn")),
}
NOMIC_KEYS: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "max_trained_positions": "max_position_embeddings",
}
"""The hub's keys to the native class's."""
NOMIC_THETA = 1000.0  # of the native class, where its keys do not say
# Where a file has the hub's keys, these must be among them: the code's defaults are others than the native class's.
NOMIC_REQUIRED = (
    *("n_embd", "n_head", "n_inner", "n_layer", "layer_norm_epsilon"),
    *("activation_function", "rotary_emb_base", "rotary_emb_fraction"),
)

NV_EMBED_CODE = r"(nvidia/NV-Embed-v2--)?(configuration|modeling)_nvembed\.\w+"
NV_EMBED: Mapping[str, Rule] = {
    **rules(HARMLESS, (*BOOKKEEPING, *GENERATION, "add_pad_token", "tie_word_embeddings")),
    **rules(HONOURED, ("_name_or_path", "architectures", "model_type")),
    "is_matryoshka": only(False, True, None),
    "matryoshka_dimensions": SIZES,
    "auto_map": Rule(
        lambda value: value is None or _all_match(value, NV_EMBED_CODE), "nvidia/NV-Embed-v2's classes", REMOTE_CODE
    ),
    "add_eos": only(True),
    "hidden_size": whole(),
    "is_mask_instruction": only(True, False),
    "latent_attention_config": HONOURED,  # see LATENT_ATTENTION
    "mask_type": only("b"),
    "padding_side": only("right"),
    **rules(only(None, cure=QUANTIZED), ("quantization", "quantization_config")),
    "text_config": HONOURED,  # see NV_EMBED_TEXT
}
NV_EMBED_TEXT: Mapping[str, Rule] = {
    **COMMON,
    **rules(HARMLESS, LABELS),
    **{key: ROTARY[key] for key in ("head_dim", "pad_token_id", "rope_theta")},
    "model_type": only("bidir_mistral", "mistral"),
    "num_key_value_heads": whole(null=True),
    "rms_norm_eps": positive(),
    "rope_parameters": HONOURED,  # see PLAIN_ROPE
    "rope_scaling": only(None),
    "sliding_window": HARMLESS,  # the reference attends to every token whatever it says
}
PLAIN_ROPE: Mapping[str, Rule] = {"rope_type": only("default"), "rope_theta": positive()}
LATENT_ATTENTION: Mapping[str, Rule] = {
    "model_type": only("latent_attention"),
    "output_normalize": only(True),
    **rules(whole(), ("cross_dim_head", "hidden_dim", "latent_dim", "num_cross_heads", "num_latents_value")),
}


@dataclass(frozen=True, slots=True)
class Config:
    """A config.json, for the checks that concern several keys."""

    named: str
    file: Path
    said: Mapping[str, Any]

    def refuse(self, key: str, supported: str, cure: str = "") -> StartupError:
        """The error for a key."""
        return unsupported(self.named, self.file, key, self.said.get(key), supported, cure)


@dataclass(frozen=True, slots=True)
class Family:
    """The keys of a `model_type`, and what they must be together."""

    keys: Mapping[str, Rule]
    classes: str
    """A pattern of the class names that `architectures` may have."""
    checks: tuple[Callable[[Config], None], ...] = ()


def _all_match(value: Any, pattern: str) -> bool:
    """Whether every class of an `auto_map` is one of these."""
    named = value.values() if isinstance(value, Mapping) else ()
    flat = [name for one in named for name in (one if isinstance(one, list) else [one])]
    return bool(flat) and all(name is None or re.fullmatch(pattern, str(name)) for name in flat)


SLIDING = "sliding_attention"
LAYER_TYPES = ("full_attention", SLIDING)


def _check_rope(config: Config) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        if config.said.get(key) is not None:
            check_keys(config.named, config.file, config.said[key], ROPE, within=key)


def _check_sliding_window(config: Config) -> None:
    """Layers are of the two kinds that packed attention has, and one with a sliding window has a width."""
    said = config.said
    layers = said.get("layer_types")
    if layers is None:
        return
    if not isinstance(layers, list) or not set(map(str, layers)) <= set(LAYER_TYPES):
        raise config.refuse("layer_types", f"lists of {' and '.join(LAYER_TYPES)}")
    if SLIDING not in layers:
        return
    if not said.get("use_sliding_window", False):
        raise config.refuse("use_sliding_window", "true, where `layer_types` has a sliding window")
    if said.get("sliding_window", 4096) is None:  # as Qwen3Config
        raise config.refuse("sliding_window", "a whole number from 1 on, where `layer_types` has a sliding window")


def _check_one_label(config: Config) -> None:
    """A relevance score is one number, and a head gives it: transformers would make up one that is missing."""
    names = config.said.get("architectures") or []
    if names and not any(name.endswith("ForSequenceClassification") for name in names):
        raise config.refuse(
            "architectures", "a ...ForSequenceClassification", "Others have no head that scores a pair."
        )
    labels = config.said.get("id2label")
    if isinstance(labels, Mapping):
        if len(labels) != 1:
            raise config.refuse("id2label", "one label", "A reranker gives one number, the relevance score.")
    elif config.said.get("num_labels") != 1:  # transformers makes a head of two where neither key is there
        raise config.refuse(
            "num_labels", "1", "A reranker gives one number, the relevance score; without it there are 2."
        )


def _check_nomic_layout(config: Config) -> None:
    """The hub's keys are there together, and agree with the native ones where a file has both."""
    said = config.said
    same = [
        (hub, said[hub], native, said[native]) for hub, native in NOMIC_KEYS.items() if {hub, native} <= said.keys()
    ]
    if "rotary_emb_base" in said and (theta := _native_theta(said)) is not None:
        same += [("rotary_emb_base", said["rotary_emb_base"], "rope_theta", theta)]
    if "activation_function" in said and "hidden_act" in said:
        same += [("activation_function", "silu", "hidden_act", said["hidden_act"])]
    for hub, one, native, other in same:
        if one != other:
            raise StartupError(
                f"{config.named}: {config.file.name} has `{hub}` ({said[hub]}) and `{native}` ({other}), which do not "
                f"agree: keep the one that the weights were trained with."
            )
    if not said.keys() & NOMIC_KEYS.keys():
        return
    missing = [key for key in NOMIC_REQUIRED if key not in said]
    if missing:
        raise StartupError(f"{config.named}: {config.file.name} leaves out `{missing[0]}`, which has no one default.")
    if said.get("rope_scaling"):
        raise config.refuse("rope_scaling", "null beside `rotary_emb_base`", "Put it into `rope_parameters`.")


def _native_theta(said: Mapping[str, Any]) -> Any:
    """The base that nomic's native class takes; None where a file has the hub's keys alone."""
    if all(said.get(key) is None for key in (*NOMIC_KEYS.values(), "rope_parameters", "rope_scaling", "rope_theta")):
        return None
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    return rope.get("rope_theta", said.get("rope_theta", NOMIC_THETA))


def _check_nv_embed(config: Config) -> None:
    text, latent = config.said.get("text_config"), config.said.get("latent_attention_config") or {}
    check_keys(config.named, config.file, text, NV_EMBED_TEXT, within="text_config")
    rope = text.get("rope_parameters") or {} if isinstance(text, Mapping) else {}
    check_keys(config.named, config.file, rope, PLAIN_ROPE, within="text_config.rope_parameters")
    check_keys(config.named, config.file, latent, LATENT_ATTENTION, within="latent_attention_config")


# What a cross-encoder's config.json says of its labels and activation; an embedder made from one has no use for it.
OF_HEAD = (*LABELS, "sbert_ce_default_activation_function", "sentence_transformers")
HEAD, NO_HEAD = rules(HONOURED, OF_HEAD), rules(HARMLESS, OF_HEAD)
BERT_EMBEDDER = Family({**BERT, **NO_HEAD}, r"Bert\w+")
XLM_ROBERTA_EMBEDDER = Family({**XLM_ROBERTA, **NO_HEAD}, r"(XLM)?Roberta\w+")
FAMILIES: Mapping[Task, Mapping[str, Family]] = {
    Task.EMBED: {
        "bert": BERT_EMBEDDER,
        "xlm-roberta": XLM_ROBERTA_EMBEDDER,
        "nomic_bert": Family({**NOMIC_BERT, **NO_HEAD}, r"NomicBert\w+", (_check_rope, _check_nomic_layout)),
        "qwen3": Family(
            {**QWEN3, **NO_HEAD, **rules(HARMLESS, OF_RERANKERS)}, r"Qwen3\w+", (_check_rope, _check_sliding_window)
        ),
        "nvembed": Family({**NV_EMBED, **NO_HEAD}, r"NVEmbedModel", (_check_nv_embed,)),
    },
    Task.RERANK: {
        "bert": Family({**BERT, **HEAD, "type_vocab_size": whole(2)}, BERT_EMBEDDER.classes, (_check_one_label,)),
        "xlm-roberta": Family({**XLM_ROBERTA, **HEAD}, XLM_ROBERTA_EMBEDDER.classes, (_check_one_label,)),
        "qwen3": Family(
            {
                **QWEN3,
                **HEAD,
                "tie_word_embeddings": only(False, True),
                **rules(HONOURED, OF_RERANKERS),
            },
            r"Qwen3\w+",
            (_check_rope, _check_sliding_window),
        ),
    },
}


def check_config(named: str, file: Path, said: Mapping[str, Any], task: Task) -> None:
    """Every key of a config.json is known, and says what is implemented.

    Args:
        named: the setting that names the model, for the error.
        file: the config.json, for the error.

    Raises:
        StartupError: the family is not served, a key is not known, or its value is not supported.
    """
    families, model_type = FAMILIES[task], str(said.get("model_type", "missing"))
    if model_type not in families:
        raise StartupError(
            f"{named}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(families))}."
        )
    family = families[model_type]
    check_keys(named, file, said, family.keys)
    config = Config(named, file, said)
    _check_architectures(config, family)
    for check in family.checks:
        check(config)


def _check_architectures(config: Config, family: Family) -> None:
    names = config.said.get("architectures")
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not (listed and all(re.fullmatch(family.classes, name) for name in names)):
        raise config.refuse("architectures", f"classes of transformers' own ({family.classes})", REMOTE_CODE)


def architecture(said: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """The keys of a config.json that make the model, without those that change nothing."""
    return honoured(said, FAMILIES[task][str(said["model_type"])].keys)


def rope_type(said: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The kind of rotary positions and its parameters, as transformers reads them."""
    parameters = said.get("rope_scaling") or said.get("rope_parameters") or {}
    return str(parameters.get("rope_type", parameters.get("type", "default"))), parameters
