"""What config.json may say: the keys that families share, and the checks of several keys. Reads no tensors.

A key that no table lists is refused: transformers keeps what it does not know, and another release, or a class of its
own, may read it. Checked before weights are fetched, so nothing here imports torch.

Sources: the configuration classes of transformers 5 and the keys that its 4.x releases wrote. What only one family has
is in its file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, only, positive, rules, unsupported, whole

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
    "architectures": HONOURED,  # see `Family.check_config`
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
    "rope_parameters": HONOURED,  # with `rope_scaling`, see `check_rope`
    "rope_scaling": HONOURED,
    "rope_theta": positive(),
    "partial_rotary_factor": only(1.0, None),
    "head_dim": whole(null=True),
    "pad_token_id": whole(0, null=True),
}


# The labels and activation of a reranker's head; an embedder that was made from a reranker does not use them.
OF_HEAD = (*LABELS, "sbert_ce_default_activation_function", "sentence_transformers")
HEAD, NO_HEAD = rules(HONOURED, OF_HEAD), rules(HARMLESS, OF_HEAD)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config.json, for the checks that concern several keys."""

    named: str
    """The setting that names the model, for errors."""
    path: Path
    content: Mapping[str, Any]

    def unsupported(self, key: str, supported: str, cure: str = "") -> StartupError:
        """The error for a key whose value is not implemented."""
        return unsupported(self.named, self.path, key, self.content.get(key), supported, cure)

    def check_agreement(self, key: str, value: Any, native: str, other: Any) -> None:
        """Raise StartupError where two keys for the same thing have different values."""
        if value != other:
            raise StartupError(
                f"{self.named}: {self.path.name} has `{key}` ({value}) and `{native}` ({other}), which do not agree: "
                f"keep the one that the weights were trained with."
            )


def own_code(pattern: str, whose: str) -> Rule:
    """`auto_map`: absent, or classes that match `pattern`, which are implemented here."""
    return Rule(lambda value: value is None or _all_match(value, pattern), f"{whose}'s classes", REMOTE_CODE)


def _all_match(auto_map: Any, pattern: str) -> bool:
    """Whether every class of an `auto_map` matches; it has at least one."""
    entries = auto_map.values() if isinstance(auto_map, Mapping) else ()
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    return bool(classes) and all(name is None or re.fullmatch(pattern, str(name)) for name in classes)


def check_architectures(config: ConfigFile, classes: str) -> None:
    """`architectures` names only classes that match the pattern `classes`.

    Raises:
        StartupError: it is no list of names, or lists another class.
    """
    names = config.content.get("architectures")
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not (listed and all(re.fullmatch(classes, name) for name in names)):
        raise config.unsupported("architectures", f"classes of transformers' own ({classes})", REMOTE_CODE)


def check_rope(config: ConfigFile) -> None:
    """The parameters of rotary positions hold keys of ROPE. Raises StartupError where they do not."""
    for key in ("rope_parameters", "rope_scaling"):
        if config.content.get(key) is not None:
            check_keys(config.named, config.path, config.content[key], ROPE, within=key)


def rope_type(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The kind of rotary positions and its parameters, as transformers reads them from a config.json.

    Parameters that are no object are none here: `check_rope` refuses them.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters")
    parameters = given if isinstance(given, Mapping) else {}
    return str(parameters.get("rope_type", parameters.get("type", "default"))), parameters


SLIDING = "sliding_attention"
LAYER_TYPES = ("full_attention", SLIDING)
# What takes turns at a length is not among them: see `check_rope_by_layer`.
LAYER_ROPE: Mapping[str, Rule] = {
    **ROPE,
    "rope_type": only("default", "linear", "yarn", "llama3"),
    "type": only("default", "linear", "yarn", "llama3"),
}


def check_layer_types(config: ConfigFile) -> None:
    """Layers are of the two kinds that packed attention has. Raises StartupError where they are not."""
    layers = config.content.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and set(map(str, layers)) <= set(LAYER_TYPES)):
        raise config.unsupported("layer_types", f"lists of {' and '.join(LAYER_TYPES)}")


def check_rope_by_layer(config: ConfigFile) -> None:
    """The parameters of rotary positions that each kind of layer has for itself; `rope_scaling`, of older files, has
    those of layers with full attention. Raises StartupError where they are not so.
    """
    kinds = config.content.get("rope_parameters")
    if kinds is not None:
        check_keys(config.named, config.path, kinds, rules(HONOURED, LAYER_TYPES), within="rope_parameters")
    parts = {f"rope_parameters.{kind}": parameters for kind, parameters in (kinds or {}).items()}
    parts["rope_scaling"] = config.content.get("rope_scaling")
    for name, parameters in parts.items():
        if parameters is not None:
            check_keys(config.named, config.path, parameters, LAYER_ROPE, within=name)
