"""What families of decoders have in common: keys of sliding windows, arguments of transformers' classes, names of
weights, and config.json of a model whose text is one half of it.

Source: the configuration and model classes of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vecmill.models.config_keys import COMMON, NO_HEAD, SLIDING, ConfigFile, check_layer_types
from vecmill.models.family import ConfigJson
from vecmill.models.keys import HARMLESS, HONOURED, Rule, only, rules, whole

# Of Qwen2 and Qwen3, together with `check_sliding_window`.
SLIDING_KEYS: Mapping[str, Rule] = {
    "layer_types": HONOURED,
    "max_window_layers": whole(0),
    "sliding_window": whole(null=True),
    "use_sliding_window": only(False, True),
}
# Of a model that reads pictures or sound too: what is not in `text_config`.
TEXT_HALF_KEYS: Mapping[str, Rule] = {
    **{key: rule for key, rule in COMMON.items() if rule is HARMLESS},
    **rules(HONOURED, ("_name_or_path", "architectures", "model_type", "text_config")),
    **{key: COMMON[key] for key in ("auto_map", "is_matryoshka", "matryoshka_dimensions", "quantization_config")},
    **rules(HARMLESS, ("image_token_id", "vision_config")),
    **NO_HEAD,
}


def check_sliding_window(config: ConfigFile) -> None:
    """Layers are of the two kinds that packed attention has, and one with a sliding window has a width."""
    check_layer_types(config)
    if SLIDING not in (config.content.get("layer_types") or ()):
        return
    if not config.content.get("use_sliding_window", False):
        raise config.unsupported("use_sliding_window", "true, where `layer_types` has a sliding window")
    if config.content.get("sliding_window", 4096) is None:  # as Qwen3Config
        raise config.unsupported("sliding_window", "a whole number from 1 on, where `layer_types` has a sliding window")


def without_cache(config: ConfigJson, positions: int) -> dict[str, Any]:
    """Arguments of a configuration class: config.json as it is, and no cache of keys and values."""
    return {**config, "use_cache": False}


def text_positions(config: ConfigJson) -> int | None:
    """`max_position_embeddings` of the half that reads text."""
    positions: int | None = config["text_config"].get("max_position_embeddings")
    return positions


def _base_name(heads: tuple[str, ...], name: str) -> Sequence[str]:
    return () if name.startswith(heads) else (name.removeprefix("model."),)


without_lm_head = partial(_base_name, ("lm_head.",))
"""A weight's name in the base model: a language model has it under a prefix, and its head is not used."""
without_head = partial(_base_name, ("lm_head.", "score.", "head."))
"""The same where a classifier's head is possible too."""
