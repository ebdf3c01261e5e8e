"""Mistral as an embedder of the last token, in its sliding window: e5-mistral, SFR-Embedding, Linq-Embed.

Texts end as the folder's tokenizer says: by its template, or by `add_eos_token`, which transformers 4 honoured.

Sources: Wang et al. 2024 (https://arxiv.org/abs/2401.00368); https://huggingface.co/intfloat/e5-mistral-7b-instruct;
https://huggingface.co/Salesforce/SFR-Embedding-Mistral; https://huggingface.co/Linq-AI-Research/Linq-Embed-Mistral;
MistralModel of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.config_keys import COMMON, NO_HEAD, ROTARY, check_rope
from vecmill.models.decoders import without_cache, without_head
from vecmill.models.family import (
    INSTRUCT_PROMPTS,
    Family,
    HubModel,
    Network,
    Positions,
    PublishedModel,
    TaskSpec,
)
from vecmill.models.keys import Rule, only, positive, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "is_causal": only(True, cure="A Mistral that looks both ways is not implemented."),
    "num_key_value_heads": whole(null=True),
    "rms_norm_eps": positive(),
    "sliding_window": whole(null=True),
}


LINQ = "Given a question, retrieve Wikipedia passages that answer the question"

MISTRAL = Family(
    model_type="mistral",
    examples=(
        HubModel("intfloat/e5-mistral-7b-instruct", Task.EMBED, 7_110_660_096, "mit", 32768, 4096, stored="float16"),
        HubModel(
            "Linq-AI-Research/Linq-Embed-Mistral",
            Task.EMBED,
            7_110_660_096,
            "cc-by-nc-4.0",
            32768,
            4096,
            stored="float16",
        ),
        HubModel(
            "Salesforce/SFR-Embedding-Mistral", Task.EMBED, 7_110_660_096, "cc-by-nc-4.0", 32768, 4096, stored="float16"
        ),
    ),
    architectures=r"Mistral(Model|ForCausalLM)",
    tasks={
        Task.EMBED: TaskSpec(
            {**KEYS, **NO_HEAD},
            Network(
                config_class="MistralConfig",
                model_class="MistralModel",
                rename=without_head,
                arguments=without_cache,
                merged=("MistralAttention", "MistralMLP"),
            ),
            (check_rope,),
        )
    },
    positions=Positions.ROTARY,
    published=(
        # Its files name prompts of tasks (`web_search_query`), and none for queries.
        PublishedModel("intfloat", r"e5-mistral-7b-instruct", INSTRUCT_PROMPTS, completes_files=True),
        PublishedModel("Salesforce", r"SFR-Embedding-(Mistral|2_R)", INSTRUCT_PROMPTS, completes_files=True),
        PublishedModel(
            "Linq-AI-Research",
            r"Linq-Embed-Mistral",
            {"query": f"Instruct: {LINQ}\nQuery: ", "document": ""},
            completes_files=True,
        ),
    ),
    is_decoder=True,
    add_eos_token=True,
)
