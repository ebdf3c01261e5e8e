"""Ministral 3 as an embedder: Nemotron-3-Embed 1B and 8B look both ways and take the mean. Nemotron-3.5-Embed 1B and 8B
read pages as pictures too; their text goes through such a model, the text half of a Mistral 3. Nemotron-3.5-Rerank 8B
scores the mean of a pair's hidden states with a linear layer.

The reranker is stored twice: as sentence-transformers' modules, whose dense layer has its temperature in it, and with a
head beside the transformer's weights, for code of its own that is not run. Where there are modules they are read.

Sources: https://huggingface.co/nvidia/Nemotron-3-Embed-1B-BF16 and -8B-BF16, nvidia/Nemotron-3.5-Embed-1B-BF16 and
Nemotron-3.5-Rerank-8B-BF16; https://github.com/NVIDIA-NeMo/Automodel (components/models/ministral_bidirectional:
reranker_model.py and reranker_export.py say what the reranker's files have);
https://docs.nvidia.com/nemo/automodel/model-coverage/embedding-models/mistralai/ministral3-bidirectional;
Ministral3Model of transformers 5, with `is_causal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, HEAD, LAYER_ROPE, NO_HEAD, ROTARY, ConfigFile, own_code
from vecmill.models.decoders import TEXT_HALF_KEYS, text_positions, without_cache, without_lm_head
from vecmill.models.family import (
    PASSAGE_PROMPTS,
    ConfigJson,
    Family,
    HubModel,
    Network,
    Positions,
    PublishedModel,
    TaskSpec,
)
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, honoured, only, positive, rules, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "is_causal": only(False, True),
    "layer_types": HARMLESS,  # the class gives every layer the same window, and says so
    "num_key_value_heads": whole(null=True),
    "pooling": only("avg", None, cure="The files of sentence-transformers beside the weights say how to pool."),
    "rms_norm_eps": positive(),
    "rope_parameters": HONOURED,  # see `_check_rope`
    "rope_scaling": only(None),
    "rope_theta": only(None, cure="Put it into `rope_parameters`."),
    "sliding_window": whole(null=True),
    "temperature": HARMLESS,  # of training
}
MINISTRAL_ROPE: Mapping[str, Rule] = {
    **LAYER_ROPE,
    "llama_4_scaling_beta": Rule(
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
        "a number from 0 to 1",
    ),
    "max_position_embeddings": HARMLESS,  # stated once more
    "original_max_position_embeddings": whole(),
}
NEEDED = ("llama_4_scaling_beta", "original_max_position_embeddings")


def _check_rope(config: ConfigFile) -> None:
    """Queries are scaled by their position with two parameters, which transformers' class cannot do without."""
    rope = config.content.get("rope_parameters")
    if rope is None:  # the class's own
        return
    check_keys(config.named, config.path, rope, MINISTRAL_ROPE, within="rope_parameters")
    if missing := [key for key in NEEDED if key not in rope]:
        raise config.unsupported("rope_parameters", f"with {' and '.join(missing)}")


def _check_window(config: ConfigFile) -> None:
    """Looking both ways transformers' implementations of attention have windows of different widths."""
    if config.content.get("is_causal") is False and config.content.get("sliding_window") is not None:
        raise config.unsupported("sliding_window", "null, where `is_causal` is false")


NETWORK = Network(
    config_class="Ministral3Config",
    model_class="Ministral3Model",
    rename=without_lm_head,
    arguments=without_cache,
    merged=("Ministral3Attention", "Ministral3MLP"),
)
MINISTRAL3 = Family(
    model_type="ministral3",
    architectures=r"Ministral3(Model|ForCausalLM)",
    tasks={Task.EMBED: TaskSpec({**KEYS, **NO_HEAD}, NETWORK, (_check_rope, _check_window))},
    positions=Positions.ROTARY,
    published=(PublishedModel("nvidia", r"Nemotron-3-Embed-[18]B-BF16", PASSAGE_PROMPTS),),
    is_decoder=True,
    examples=(
        HubModel(
            "nvidia/Nemotron-3-Embed-1B-BF16", Task.EMBED, 1_140_000_000, "openmdw-1.1", 32_768, 2048, stored="bfloat16"
        ),
        HubModel(
            "nvidia/Nemotron-3-Embed-8B-BF16", Task.EMBED, 7_950_000_000, "openmdw-1.1", 32_768, 4096, stored="bfloat16"
        ),
    ),
)


MISTRAL3_KEYS: Mapping[str, Rule] = {
    **TEXT_HALF_KEYS,
    "auto_map": own_code(r"(nvidia/[\w.-]+--)?model\.Mistral3ForSequenceClassification", "NVIDIA"),
    "is_causal": HONOURED,  # see `_check_text_config`
    "score_temperature": HARMLESS,  # it is in the dense layer of a reranker that is stored as modules
    # Of pictures.
    **rules(HARMLESS, ("image_token_index", "multimodal_projector_bias", "projector_hidden_act")),
    **rules(HARMLESS, ("spatial_merge_size", "vision_feature_layer")),
    "pooling": KEYS["pooling"],
    "temperature": HARMLESS,
}


def _check_text_config(config: ConfigFile) -> None:
    """What the text half has, by the keys of a Ministral 3."""
    text = config.content.get("text_config")
    known = {**KEYS, **NO_HEAD, "model_type": only("ministral3")}
    check_keys(config.named, config.path, text, known, within="text_config")
    own = ConfigFile(config.named, config.path, text or {})
    _check_rope(own)
    _check_window(own)
    if "is_causal" in config.content and config.content["is_causal"] is not own.content.get("is_causal", True):
        raise config.unsupported("is_causal", "as `text_config` has it, which alone is read")


def _text_arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    return without_cache(honoured(config["text_config"], {**KEYS, **NO_HEAD}), positions)


def _score_arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The labels of a head are stated beside `text_config`."""
    labels = {key: config[key] for key in ("id2label", "label2id", "num_labels") if key in config}
    return {**_text_arguments(config, positions), **labels}


def _rename_text(name: str) -> Sequence[str]:
    """transformers has stored the text half under several names."""
    for prefix in ("model.", "language_model.", "model."):
        name = name.removeprefix(prefix)
    return () if name.startswith(("vision_tower.", "multi_modal_projector.", "lm_head.", "score.")) else (name,)


MISTRAL3 = Family(
    model_type="mistral3",
    architectures=r"Mistral3(Model|ForSequenceClassification)",
    tasks={
        Task.EMBED: TaskSpec(
            MISTRAL3_KEYS,
            replace(NETWORK, arguments=_text_arguments, rename=_rename_text),
            (_check_text_config,),
        ),
        Task.RERANK: TaskSpec(
            {**MISTRAL3_KEYS, **HEAD, "pooling": only("avg"), "score_temperature": positive()},
            replace(
                NETWORK,
                arguments=_score_arguments,
                rename=_rename_text,
                pooling="mean",
                both_ways=True,
                score_divisor="score_temperature",
            ),
            (_check_text_config,),
        ),
    },
    positions=Positions.ROTARY,
    published=(PublishedModel("nvidia", r"Nemotron-3\.5-Embed-[18]B-BF16", PASSAGE_PROMPTS),),
    max_positions=text_positions,
    text_half=True,
    is_decoder=True,
    examples=(
        HubModel(
            "nvidia/Nemotron-3.5-Embed-1B-BF16",
            Task.EMBED,
            1_141_000_000,
            "see its card",
            32_768,
            2048,
            stored="bfloat16",
            note="its text half",
        ),
        HubModel(
            "nvidia/Nemotron-3.5-Rerank-8B-BF16",
            Task.RERANK,
            8_380_000_000,
            "see its card",
            32_768,
            stored="bfloat16",
            note="its text half",
        ),
    ),
)
