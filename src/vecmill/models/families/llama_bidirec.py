"""Llama looking both ways, with the mean of its hidden states: llama-nemotron-embed-1b-v2, llama-embed-nemotron-8b; and
llama-nemotron-rerank-1b-v2, whose score is a linear layer on that mean.

The hub's folders name code of their own, which is LlamaModel with another mask; it is not run.

Sources: https://huggingface.co/nvidia/llama-nemotron-embed-1b-v2; https://huggingface.co/nvidia/llama-nemotron-rerank-1b-v2;
https://github.com/NVIDIA-NeMo/Automodel (components/models/llama_bidirectional); LlamaModel of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vecmill.core.types import Task
from vecmill.models.chat_template import PairPrompt, Slot
from vecmill.models.config_keys import COMMON, HEAD, NO_HEAD, ROTARY, check_rope, own_code
from vecmill.models.decoders import without_head
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
from vecmill.models.keys import HARMLESS, Rule, only, positive, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "attention_bias": only(False, True),
    "auto_map": own_code(r"(nvidia/[\w.-]+--)?(llama_bidirectional_model|model)\.LlamaBidirectional\w+", "NVIDIA"),
    "is_causal": only(False, None),
    "mlp_bias": only(False, True),
    "num_key_value_heads": whole(null=True),
    "pooling": only("avg"),  # the code of the folder pools so
    "pretraining_tp": HARMLESS,
    "rms_norm_eps": positive(),
    "temperature": positive(),
    "use_bidirectional_attention": only(True, None),
}
OWN = ("auto_map", "pooling", "temperature", "use_bidirectional_attention")  # not LlamaConfig's


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    llama = {key: value for key, value in config.items() if key not in (*OWN, "model_type")}
    return {**llama, "use_cache": False, "is_causal": False}


def _network(**others: Any) -> Network:
    return Network(
        config_class="LlamaConfig",
        model_class="LlamaModel",
        rename=without_head,
        arguments=_arguments,
        merged=("LlamaAttention", "LlamaMLP"),
        **others,
    )


BEGIN = "<|begin_of_text|>"  # Llama 3's tokenizer puts it before every text
PAIR = (f"{BEGIN}question:", Slot.QUERY, " \n \n passage:", Slot.DOCUMENT)
PAIR_PROMPT = PairPrompt(PAIR, PAIR)

LLAMA_BIDIREC = Family(
    model_type="llama_bidirec",
    architectures=r"LlamaBidirectional(Model|ForSequenceClassification)",
    tasks={
        Task.EMBED: TaskSpec({**KEYS, **NO_HEAD}, _network(), (check_rope,)),
        Task.RERANK: TaskSpec(
            {**KEYS, **HEAD}, _network(pooling="mean", both_ways=True, score_divisor="temperature"), (check_rope,)
        ),
    },
    positions=Positions.ROTARY,
    published=(
        PublishedModel(
            "nvidia",
            r"llama-nemotron-embed-1b-v2|llama-3\.2-nv-embedqa-1b-v2",
            PASSAGE_PROMPTS,
            dimensions=(384, 512, 768, 1024, 2048),
        ),
    ),
    is_decoder=True,
    pair_prompt=PAIR_PROMPT,
    examples=(
        HubModel(
            "nvidia/llama-nemotron-embed-1b-v2",
            Task.EMBED,
            1_235_814_400,
            "see its card",
            8192,
            2048,
            stored="bfloat16",
        ),
        HubModel(
            "nvidia/llama-nemotron-rerank-1b-v2", Task.RERANK, 1_235_816_448, "see its card", 8192, stored="bfloat16"
        ),
    ),
)
