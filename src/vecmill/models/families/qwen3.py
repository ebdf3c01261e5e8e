"""Qwen3-Embedding 0.6B, 4B and 8B: the hidden state of the last token. Rerankers on a Qwen3 decoder: how much more
likely one token is than another after the prompt (Qwen3-Reranker 0.6B, 4B and 8B), or a classification head.

Querit-4B has a head of two labels on [CLS], which ends its prompt; its own score is the probability of the second less
that of the first, and ours are the logit and the probability of the second. Its card prints no prompt: this is the one
that its authors registered at MTEB.

Sources: Zhang et al. 2025 (https://arxiv.org/abs/2506.05176); https://huggingface.co/Qwen/Qwen3-Embedding-0.6B;
https://huggingface.co/Qwen/Qwen3-Reranker-0.6B (the transformers recipe; single line breaks);
https://huggingface.co/zeroentropy/zerank-2 (the query as the system's message; sigmoid of a fifth of the logit);
https://huggingface.co/Querit/Querit-4B; its paper, https://arxiv.org/abs/2606.19037 (the head and what it reads);
https://github.com/embeddings-benchmark/mteb at 462e9ae (models/model_implementations/querit_models.py: the prompt).
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.chat_template import PairPrompt, Slot
from vecmill.models.config_keys import (
    COMMON,
    HEAD,
    NO_HEAD,
    ROTARY,
    check_rope,
)
from vecmill.models.decoders import SLIDING_KEYS, check_sliding_window, without_cache, without_head
from vecmill.models.family import (
    DEFAULT_INSTRUCTION,
    AnswerWords,
    Family,
    HubModel,
    Network,
    Positions,
    PublishedModel,
    TaskSpec,
)
from vecmill.models.keys import HARMLESS, HONOURED, Rule, only, positive, rules, whole

KEYS: Mapping[str, Rule] = {
    **COMMON,
    **ROTARY,
    "attention_bias": only(False, True),
    "head_dim": whole(),
    "is_causal": only(True, cure="A Qwen3 that looks both ways, as null makes it too, is not implemented."),
    **SLIDING_KEYS,
    "num_key_value_heads": whole(null=True),
    "rms_norm_eps": positive(),
}
FLAG = "is_original_qwen3_reranker"
OF_RERANKERS = ("classifier_from_token", FLAG)  # vLLM's, of language models that score
NETWORK = Network(
    config_class="Qwen3Config",
    model_class="Qwen3Model",
    rename=without_head,
    arguments=without_cache,
    merged=("Qwen3Attention", "Qwen3MLP"),
)
SMALLEST_VECTOR = 32


def _dimensions(width: int) -> range:
    return range(min(SMALLEST_VECTOR, width), width + 1)


PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
PAIR = (
    f"{PREFIX}<Instruct>: ",
    Slot.INSTRUCTION,
    "\n<Query>: ",
    Slot.QUERY,
    "\n<Document>: ",
    Slot.DOCUMENT,
    SUFFIX,
)
PAIR_PROMPT = PairPrompt(PAIR, PAIR, DEFAULT_INSTRUCTION)
ZERANK = ("<|im_start|>system\n", Slot.QUERY, "<|im_end|>\n<|im_start|>user\n", Slot.DOCUMENT, ASSISTANT)
QUERIT_CLASSES = "MLQwen3Model|QueritModel"  # its config.json names the first, its code the second
JUDGE = "Judge whether the Content meets the requirements based on the Query."
QUERIT_PAIR = (" Query: ", Slot.QUERY, "; Content: ", Slot.DOCUMENT, "[CLS]")
QUERIT = PairPrompt((f"{JUDGE}{QUERIT_PAIR[0]}", *QUERIT_PAIR[1:]), (Slot.INSTRUCTION, *QUERIT_PAIR))
CHECKS = (check_rope, check_sliding_window)

QWEN3 = Family(
    model_type="qwen3",
    architectures=rf"Qwen3\w+|{QUERIT_CLASSES}",
    two_label_head=QUERIT_CLASSES,
    tasks={
        Task.EMBED: TaskSpec({**KEYS, **NO_HEAD, **rules(HARMLESS, OF_RERANKERS)}, NETWORK, CHECKS),
        Task.RERANK: TaskSpec(
            {**KEYS, **HEAD, "tie_word_embeddings": only(False, True), **rules(HONOURED, OF_RERANKERS)}, NETWORK, CHECKS
        ),
    },
    positions=Positions.ROTARY,
    examples=(
        HubModel("Qwen/Qwen3-Embedding-0.6B", Task.EMBED, 595_776_512, "apache-2.0", 32_768, 1024, stored="bfloat16"),
        HubModel("Qwen/Qwen3-Embedding-4B", Task.EMBED, 4_021_774_336, "apache-2.0", 40_960, 2560, stored="bfloat16"),
        HubModel("Qwen/Qwen3-Embedding-8B", Task.EMBED, 7_567_295_488, "apache-2.0", 40_960, 4096, stored="bfloat16"),
        HubModel("Qwen/Qwen3-Reranker-0.6B", Task.RERANK, 595_776_512, "apache-2.0", 40_960, stored="bfloat16"),
        HubModel("Qwen/Qwen3-Reranker-4B", Task.RERANK, 4_021_784_576, "apache-2.0", 40_960, stored="bfloat16"),
        HubModel("Qwen/Qwen3-Reranker-8B", Task.RERANK, 8_188_548_096, "apache-2.0", 40_960, stored="bfloat16"),
        HubModel("Querit/Querit-4B", Task.RERANK, 4_021_779_456, "apache-2.0", 40_960, stored="bfloat16"),
    ),
    published=(
        PublishedModel(
            "Qwen",
            r"Qwen3-Embedding-[\d.]+B",
            {"query": f"Instruct: {DEFAULT_INSTRUCTION}\nQuery:", "document": ""},
        ),
        PublishedModel("Qwen", r"Qwen3-Reranker-[\d.]+B", pair_prompt=PAIR_PROMPT),
        PublishedModel(
            "zeroentropy",
            r"zerank-(1|1-small|2)(-reranker)?",
            pair_prompt=PairPrompt(ZERANK, ZERANK),
            answers=AnswerWords("Yes", None, scale=1 / 5),
        ),
        PublishedModel("Querit", r"Querit-4B", pair_prompt=QUERIT),
        PublishedModel("tomaarsen", r"Qwen3-Reranker-[\d.]+B-seq-cls", pair_prompt=PAIR_PROMPT),
    ),
    dimensions=_dimensions,
    is_decoder=True,
    pair_prompt=PAIR_PROMPT,
    pair_prompt_flag=FLAG,
)
