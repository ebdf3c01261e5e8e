"""The text of EmbeddingGemma 2: looks both ways, windows and two rotary bases, wider layers with full attention, a part
of the token embeddings again in every layer, and a projection to 768 dimensions before the mean.

Sources: https://huggingface.co/google/embeddinggemma-2; EmbeddingGemma2TextModel of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import (
    ACTIVATIONS,
    COMMON,
    NO_HEAD,
    ROTARY,
    ConfigFile,
    check_layer_types,
    check_rope_by_layer,
)
from vecmill.models.decoders import TEXT_HALF_KEYS, text_positions
from vecmill.models.families.gemma3 import GEMMA_PROMPTS, MATRYOSHKA
from vecmill.models.family import ConfigJson, Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, honoured, only, positive, rules, whole

TEXT: Mapping[str, Rule] = {
    **COMMON,
    **{key: ROTARY[key] for key in ("pad_token_id", "rope_parameters")},
    **NO_HEAD,
    "model_type": only("embedding_gemma2_text"),
    "attention_bias": only(False, True),
    "embedding_dim": whole(),
    "global_head_dim": whole(),
    "head_dim": whole(),
    "hidden_act": HARMLESS,  # the class reads the next
    "hidden_activation": only(*ACTIVATIONS),
    "hidden_size_per_layer_input": whole(),
    "layer_types": HONOURED,  # see `check_layer_types`
    "num_global_key_value_heads": whole(),
    "num_key_value_heads": whole(),
    "per_layer_config": HONOURED,  # see `_check_text_config`
    "rms_norm_eps": positive(),
    "sliding_window": whole(),
    "sliding_window_pattern": whole(),
}
OF_A_LAYER: Mapping[str, Rule] = {"head_dim": whole(), "num_key_value_heads": whole()}
KEYS: Mapping[str, Rule] = {
    **TEXT_HALF_KEYS,
    # Of pictures and sound.
    **rules(HARMLESS, ("audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_index")),
    **rules(HARMLESS, ("eoi_token_id", "video_token_id")),
}


def _check_text_config(config: ConfigFile) -> None:
    text = config.content.get("text_config")
    check_keys(config.named, config.path, text, TEXT, within="text_config")
    own = ConfigFile(config.named, config.path, text or {})
    layers = own.content.get("per_layer_config") or {}
    check_keys(config.named, config.path, layers, rules(HONOURED, layers), within="text_config.per_layer_config")
    for number, layer in layers.items():
        check_keys(config.named, config.path, layer, OF_A_LAYER, within=f"text_config.per_layer_config.{number}")
    check_layer_types(own)
    check_rope_by_layer(own)


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    text = honoured(config["text_config"], TEXT)
    return {key: value for key, value in text.items() if key != "model_type"}


def _rename(name: str) -> Sequence[str]:
    """Of the whole model's weights those of its text."""
    other = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
    return () if name.startswith(other) else (name.removeprefix("language_model."),)


EMBEDDING_GEMMA2 = Family(
    model_type="embedding_gemma2",
    architectures=r"EmbeddingGemma2Model",
    tasks={
        Task.EMBED: TaskSpec(
            KEYS,
            Network(
                config_class="EmbeddingGemma2TextConfig",
                model_class="EmbeddingGemma2TextModel",
                rename=_rename,
                arguments=_arguments,
                merged=("EmbeddingGemma2MLP",),
            ),
            (_check_text_config,),
        )
    },
    positions=Positions.ROTARY,
    published=(PublishedModel("google", r"embeddinggemma-2", GEMMA_PROMPTS, dimensions=MATRYOSHKA),),
    max_positions=text_positions,
    text_half=True,
    width_key="embedding_dim",
    float16=False,
    examples=(
        HubModel("google/embeddinggemma-2", Task.EMBED, 270_000_000, "apache-2.0", 8192, 768, note="its text half"),
    ),
)
