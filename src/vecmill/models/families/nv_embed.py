"""NV-Embed-v2: a Mistral that looks both ways, latent attention over its hidden states, a mean without the instruction.

Sources: Lee et al. 2024 (https://arxiv.org/abs/2405.17428); the code of https://huggingface.co/nvidia/NV-Embed-v2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import BOOKKEEPING, COMMON, GENERATION, LABELS, NO_HEAD, ROTARY, ConfigFile, own_code
from vecmill.models.decoders import text_positions
from vecmill.models.family import (
    ConfigJson,
    Family,
    HubModel,
    Network,
    Positions,
    PublishedModel,
    TaskSpec,
    TextFormat,
    Unpooled,
)
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, honoured, only, positive, rules, whole

KEYS: Mapping[str, Rule] = {
    **rules(HARMLESS, (*BOOKKEEPING, *GENERATION, "add_pad_token", "tie_word_embeddings")),
    **rules(HONOURED, ("_name_or_path", "architectures", "model_type")),
    **{key: COMMON[key] for key in ("is_matryoshka", "matryoshka_dimensions", "quantization", "quantization_config")},
    "auto_map": own_code(r"(nvidia/NV-Embed-v2--)?(configuration|modeling)_nvembed\.\w+", "nvidia/NV-Embed-v2"),
    "add_eos": only(True),
    "hidden_size": whole(),
    "is_mask_instruction": only(True, False),
    "latent_attention_config": HONOURED,  # see LATENT_ATTENTION
    "mask_type": only("b"),
    "padding_side": only("right"),
    "text_config": HONOURED,  # see TEXT
    **NO_HEAD,
}
TEXT: Mapping[str, Rule] = {
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


def _check_parts(config: ConfigFile) -> None:
    text, latent = config.content.get("text_config"), config.content.get("latent_attention_config") or {}
    check_keys(config.named, config.path, text, TEXT, within="text_config")
    rope = text.get("rope_parameters") or {} if isinstance(text, Mapping) else {}
    check_keys(config.named, config.path, rope, PLAIN_ROPE, within="text_config.rope_parameters")
    check_keys(config.named, config.path, latent, LATENT_ATTENTION, within="latent_attention_config")


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The backbone's: it looks both ways, at every token."""
    backbone = honoured(config["text_config"], TEXT)
    del backbone["model_type"]
    return {**backbone, "sliding_window": None, "use_cache": False, "is_causal": False}


def _rename(name: str) -> Sequence[str]:
    """The backbone's weights; those of the latent attention have a file of their own, `latent_attention`."""
    return () if name.startswith("latent_attention_model.") else (name.removeprefix("embedding_model."),)


def _text_format(config: ConfigJson) -> TextFormat:
    """The reference appends the end as text, and then cuts on the right."""
    unpooled: Unpooled = "instruction" if config.get("is_mask_instruction", True) else "nothing"
    return TextFormat("</s>", end_survives_truncation=False, unpooled=unpooled)


NV_EMBED = Family(
    model_type="nvembed",
    architectures=r"NVEmbedModel",
    tasks={
        Task.EMBED: TaskSpec(
            KEYS,
            Network(
                config_class="MistralConfig",
                model_class="MistralModel",
                rename=_rename,
                arguments=_arguments,
                merged=("MistralAttention", "MistralMLP"),
                latent_attention="latent_attention_config",
                pooling="mean",
            ),
            (_check_parts,),
        )
    },
    positions=Positions.ROTARY,
    examples=(
        HubModel(
            "nvidia/NV-Embed-v2",
            Task.EMBED,
            7_851_016_192,
            "cc-by-nc-4.0",
            32_768,
            4096,
            stored="float16",
            note="gated: accept its terms on the hub and set HF_TOKEN",
        ),
    ),
    published=(
        PublishedModel(
            "nvidia",
            r"NV-Embed-v[12]",
            {
                "query": "Instruct: Given a question, retrieve passages that answer the question\nQuery: ",
                "document": "",
            },
        ),
    ),
    max_positions=text_positions,
    text_format=_text_format,
    tokenizer_as_it_stands=True,
)
