"""Gemma 3's text model as an embedder: looking both ways (EmbeddingGemma-300M: a mean, then two dense layers) or back
only (harrier-oss-v1-270m: the last token).

Sources: Vera et al. 2025 (https://arxiv.org/abs/2509.20354); https://huggingface.co/google/embeddinggemma-300m;
https://huggingface.co/microsoft/harrier-oss-v1-270m; Gemma3TextModel of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.config_keys import (
    ACTIVATIONS,
    COMMON,
    NO_HEAD,
    ROTARY,
    check_layer_types,
    check_rope_by_layer,
)
from vecmill.models.decoders import without_cache, without_lm_head
from vecmill.models.family import Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HARMLESS, HONOURED, Rule, only, positive, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "_sliding_window_pattern": HARMLESS,  # transformers' own, of what it made `layer_types`
    "attention_bias": only(False, True),
    "attn_logit_softcapping": only(None),  # no Gemma 3 has it, and transformers' class does not apply it
    "cache_implementation": HARMLESS,
    "final_logit_softcapping": HARMLESS,  # of the head, which is not used
    "head_dim": whole(),
    "hidden_act": HARMLESS,  # the class reads the next
    "hidden_activation": only(*ACTIVATIONS),
    "layer_types": HONOURED,  # see `check_layer_types`
    "num_key_value_heads": whole(),
    "query_pre_attn_scalar": whole(),
    "rms_norm_eps": positive(),
    "rope_local_base_freq": positive(),
    "sliding_window": whole(),
    "sliding_window_pattern": whole(),
    "use_bidirectional_attention": only(False, True, None),
}
MATRYOSHKA = (128, 256, 512, 768)
GEMMA_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


GEMMA3 = Family(
    model_type="gemma3_text",
    architectures=r"Gemma3(TextModel|ForCausalLM)",
    tasks={
        Task.EMBED: TaskSpec(
            {**KEYS, **NO_HEAD},
            Network(
                config_class="Gemma3TextConfig",
                model_class="Gemma3TextModel",
                rename=without_lm_head,
                arguments=without_cache,
                merged=("Gemma3Attention", "Gemma3MLP"),
            ),
            (check_layer_types, check_rope_by_layer),
        )
    },
    positions=Positions.ROTARY,
    published=tuple(
        PublishedModel(
            owner,
            r"embeddinggemma-300m(-qat-q[48]_0-unquantized)?",
            GEMMA_PROMPTS,
            dimensions=MATRYOSHKA,
        )
        for owner in ("google", "unsloth")
    ),
    is_decoder=True,
    float16=False,
    examples=(HubModel("google/embeddinggemma-300m", Task.EMBED, 307_581_696, "gemma", 2048, 768),),
)
