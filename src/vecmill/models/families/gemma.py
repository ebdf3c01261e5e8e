"""Gemma (the first) as a reranker: bge-reranker-v2-gemma answers whether a passage has the answer to a query, and its
score is the logit of "Yes".

Query, passage and question are tokenized apart, as its library does, with a line break between them.

Sources: https://huggingface.co/BAAI/bge-reranker-v2-gemma; https://github.com/FlagOpen/FlagEmbedding
(inference/reranker/decoder_only/base.py); GemmaModel of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.chat_template import APART, PairPrompt, Slot
from vecmill.models.config_keys import COMMON, HEAD, ROTARY, check_rope
from vecmill.models.decoders import without_cache, without_head
from vecmill.models.family import AnswerWords, Family, HubModel, Network, Positions, PublishedModel, TaskSpec
from vecmill.models.keys import HONOURED, Rule, only, positive, whole

TANH = "gelu_pytorch_tanh"  # which the class takes for `gelu` too
KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    **HEAD,
    "attention_bias": only(False, True),
    "classifier_from_token": HONOURED,  # vLLM's
    "head_dim": whole(),
    "hidden_activation": only(TANH, None, cure="transformers 5 reads `hidden_act` alone."),
    "num_key_value_heads": whole(),
    "rms_norm_eps": positive(),
    "tie_word_embeddings": only(False, True),
    "use_bidirectional_attention": only(False, None, cure="A reranker that looks both ways is not implemented."),
}
QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
PAIR = ("<bos>", APART, "A: ", Slot.QUERY, APART, "\n", APART, "B: ", Slot.DOCUMENT, APART, "\n", APART, QUESTION)

GEMMA = Family(
    model_type="gemma",
    architectures=r"Gemma(ForCausalLM|ForSequenceClassification)",
    tasks={
        Task.RERANK: TaskSpec(
            KEYS,
            Network(
                config_class="GemmaConfig",
                model_class="GemmaModel",
                rename=without_head,
                arguments=without_cache,
                merged=("GemmaAttention", "GemmaMLP"),
            ),
            (check_rope,),
        )
    },
    positions=Positions.ROTARY,
    published=(
        PublishedModel(
            "BAAI", r"bge-reranker-v2-gemma", pair_prompt=PairPrompt(PAIR, PAIR), answers=AnswerWords("Yes", None)
        ),
    ),
    is_decoder=True,
    float16=False,
    examples=(HubModel("BAAI/bge-reranker-v2-gemma", Task.RERANK, 2_506_172_416, "apache-2.0", 8192),),
)
