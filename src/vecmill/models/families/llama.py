"""Llama as an embedder of the last token or of the mean, as its files say: what was fine-tuned from Llama 2 and 3.

Source: LlamaModel of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, NO_HEAD, ROTARY, check_rope
from vecmill.models.decoders import without_cache, without_head
from vecmill.models.family import Family, HubModel, Network, Positions, TaskSpec
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
                arguments=without_cache,
                merged=("LlamaAttention", "LlamaMLP"),
            ),
            (check_rope,),
        )
    },
    positions=Positions.ROTARY,
    is_decoder=True,
    add_eos_token=True,
)
