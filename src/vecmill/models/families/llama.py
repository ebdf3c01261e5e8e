"""Llama as an embedder of the last token or of the mean, as its files say: what was fine-tuned from Llama 2 and 3.

Source: LlamaModel of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, NO_HEAD, ROTARY, check_rope
from vecmill.models.families.qwen3 import without_head
from vecmill.models.family import ConfigJson, Family, HubModel, Network, Positions, TaskSpec
from vecmill.models.keys import HARMLESS, Rule, only, positive, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "attention_bias": only(False, True),
    "is_causal": only(True, False),
    "mlp_bias": only(False, True),
    "num_key_value_heads": whole(null=True),
    "pretraining_tp": HARMLESS,
    "rms_norm_eps": positive(),
}


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    return {**config, "use_cache": False}


LLAMA = Family(
    model_type="llama",
    examples=(HubModel("keeeeenw/MicroLlama-text-embedding", Task.EMBED, 271_869_952, "apache-2.0", 2048, 1024),),
    architectures=r"Llama(Model|ForCausalLM)",
    tasks={
        Task.EMBED: TaskSpec(
            {**KEYS, **NO_HEAD},
            Network(
                config_class="LlamaConfig",
                model_class="LlamaModel",
                rename=without_head,
                arguments=_arguments,
                merged=("LlamaAttention", "LlamaMLP"),
            ),
            (check_rope,),
        )
    },
    positions=Positions.ROTARY,
    is_decoder=True,
    add_eos_token=True,
)
