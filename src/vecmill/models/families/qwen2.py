"""Qwen2 and Qwen2.5 as embedders of the last token or of the mean, as their files say: gte-Qwen2, which looks both
ways, and jina-code-embeddings, which does not.

The hub's gte-Qwen2 names code of its own, which is Qwen2Model with another mask and Qwen2Tokenizer with an end token.
It is not run: transformers has both.

mxbai-rerank-v2 answers with a digit.

Sources: https://huggingface.co/Alibaba-NLP/gte-Qwen2-1.5B-instruct; https://github.com/mixedbread-ai/mxbai-rerank
(mxbai_rerank_v2.py; it tokenizes query and document apart, here the text is tokenized whole); Qwen2Model of
transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vecmill.core.types import Task
from vecmill.models.chat_template import PairPrompt, Slot
from vecmill.models.config_keys import COMMON, HEAD, NO_HEAD, ROTARY, SLIDING, ConfigFile, check_rope, own_code
from vecmill.models.decoders import SLIDING_KEYS, check_sliding_window, without_cache, without_head
from vecmill.models.family import (
    INSTRUCT_PROMPTS,
    AnswerWords,
    ConfigJson,
    Family,
    HubModel,
    Network,
    Positions,
    PublishedModel,
    TaskSpec,
)
from vecmill.models.keys import HONOURED, Rule, only, positive, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "auto_map": own_code(r"(Alibaba-NLP/[\w.-]+--)?modeling_qwen\.Qwen2\w+", "gte-Qwen2"),
    "is_causal": only(True, False),
    **SLIDING_KEYS,
    "num_key_value_heads": whole(null=True),
    "rms_norm_eps": positive(),
}


def _check_ways(config: ConfigFile) -> None:
    """Both ways only where it is said, and not in a window, whose width transformers' implementations differ on."""
    content = config.content
    if content.get("auto_map") is not None and "is_causal" not in content:
        raise config.unsupported("is_causal", "false with this `auto_map`", "Its own code looks both ways: state it.")
    if content.get("is_causal", True):
        return
    layers = content.get("layer_types")
    windowed = SLIDING in layers if isinstance(layers, list) else content.get("use_sliding_window", False)
    if windowed:
        raise config.unsupported("use_sliding_window", "false, where `is_causal` is false")


def _arguments(config: ConfigJson, positions: int) -> dict[str, Any]:
    return without_cache({key: value for key, value in config.items() if key != "auto_map"}, positions)


NETWORK = Network(
    config_class="Qwen2Config",
    model_class="Qwen2Model",
    rename=without_head,
    arguments=_arguments,
    merged=("Qwen2Attention", "Qwen2MLP"),
)
RELEVANCE = (
    "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
)
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
BEGIN = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
PAIR = ("query: ", Slot.QUERY, "\ndocument: ", Slot.DOCUMENT, RELEVANCE)
MXBAI = PairPrompt(
    (f"{BEGIN}{PAIR[0]}", *PAIR[1:]),
    (f"{BEGIN}instruction: ", Slot.INSTRUCTION, f"\n{PAIR[0]}", *PAIR[1:]),
)
CHECKS = (check_rope, check_sliding_window, _check_ways)

QWEN2 = Family(
    model_type="qwen2",
    examples=(
        HubModel("Alibaba-NLP/gte-Qwen2-1.5B-instruct", Task.EMBED, 1_543_268_864, "apache-2.0", 32768, 1536),
        HubModel("Alibaba-NLP/gte-Qwen2-7B-instruct", Task.EMBED, 7_069_121_024, "apache-2.0", 32768, 3584),
        HubModel(
            "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5",
            Task.EMBED,
            494_032_768,
            "apache-2.0",
            512,
            896,
        ),
        HubModel("mixedbread-ai/mxbai-rerank-base-v2", Task.RERANK, 494_032_768, "apache-2.0", 32768),
        HubModel("mixedbread-ai/mxbai-rerank-large-v2", Task.RERANK, 1_543_714_304, "apache-2.0", 32768),
    ),
    architectures=r"Qwen2(Model|ForCausalLM|ForSequenceClassification)",
    tasks={
        Task.EMBED: TaskSpec({**KEYS, **NO_HEAD}, NETWORK, CHECKS),
        Task.RERANK: TaskSpec(
            {
                **KEYS,
                **HEAD,
                "classifier_from_token": HONOURED,  # vLLM's
                "is_causal": only(True, cure="A reranker that looks both ways is not implemented."),
                "tie_word_embeddings": only(False, True),
            },
            NETWORK,
            CHECKS,
        ),
    },
    positions=Positions.ROTARY,
    published=(
        PublishedModel(
            "Alibaba-NLP",
            r"gte-Qwen2-[\d.]+B-instruct",
            INSTRUCT_PROMPTS,
        ),
        PublishedModel(
            "mixedbread-ai", r"mxbai-rerank-(base|large)-v2", pair_prompt=MXBAI, answers=AnswerWords("1", "0")
        ),
    ),
    is_decoder=True,
    add_eos_token=True,
)
