"""Ministral 3 as an embedder: Nemotron-3-Embed 1B and 8B look both ways and take the mean.

Sources: https://huggingface.co/nvidia/Nemotron-3-Embed-1B-BF16 and -8B-BF16;
https://docs.nvidia.com/nemo/automodel/model-coverage/embedding-models/mistralai/ministral3-bidirectional;
Ministral3Model of transformers 5, with `is_causal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, NO_HEAD, ROPE, ROTARY, ConfigFile
from vecmill.models.family import ConfigJson, Family, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, only, positive, whole

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
    **ROPE,
    "rope_type": only("default", "linear", "yarn", "llama3"),
    "type": only("default", "linear", "yarn", "llama3"),
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


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    return {**config, "use_cache": False}


def _rename(name: str) -> Sequence[str]:
    """Embedders are stored under the base model's names, language models under a prefix and with a head."""
    return () if name.startswith("lm_head.") else (name.removeprefix("model."),)


NETWORK = Network(
    config_class="Ministral3Config",
    model_class="Ministral3Model",
    rename=_rename,
    arguments=_arguments,
    merged=("Ministral3Attention", "Ministral3MLP"),
)
PROMPTS = {"query": "query: ", "document": "passage: "}

MINISTRAL3 = Family(
    model_type="ministral3",
    architectures=r"Ministral3(Model|ForCausalLM)",
    tasks={Task.EMBED: TaskSpec({**KEYS, **NO_HEAD}, NETWORK, (_check_rope, _check_window))},
    positions=Positions.ROTARY,
    published=(PublishedModel("nvidia", r"Nemotron-3-Embed-[18]B-BF16", PROMPTS),),
    is_decoder=True,
)
