"""What model cards prescribe and checkpoints leave out: prompts, instructions, dimensions. Reads no tensors.

Sources: the cards at https://huggingface.co, each under the name that its pattern matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vecmill.core.types import Task
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import DEFAULT_INSTRUCTION

BGE_EN = "Represent this sentence for searching relevant passages: "
BGE_ZH = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001  # as the card has it
NOMIC = {
    "query": "search_query: ",
    "document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}

# By the last part of the model's name, the first that matches.
PROMPTS: tuple[tuple[str, Mapping[str, str]], ...] = (
    (r"bge-(small|base|large)-en(-v1\.5)?", {"query": BGE_EN}),
    (r"bge-(small|base|large)-zh(-v1\.5)?", {"query": BGE_ZH}),
    (r"(multilingual-)?e5-(small|base|large)(-v2)?", {"query": "query: ", "document": "passage: "}),
    (r"multilingual-e5-large-instruct", {"query": f"Instruct: {DEFAULT_INSTRUCTION}\nQuery: "}),
)
# By family, whatever the name.
FAMILY_PROMPTS: Mapping[str, Mapping[str, str]] = {
    "qwen3": {
        "query": f"Instruct: {DEFAULT_INSTRUCTION}\nQuery:",
        "document": "",
    },
    "nvembed": {
        "query": "Instruct: Given a question, retrieve passages that answer the question\nQuery: ",
        "document": "",
    },
    "nomic_bert": NOMIC,
}
INSTRUCT = re.compile(r"^Instruct: (?P<instruction>.*)\nQuery:(?P<space> ?)$", re.DOTALL)
INSTRUCTION = "{instruction}"

NOMIC_V1_5 = r"nomic-embed-text-v1\.5"
NOMIC_V1_5_DIMENSIONS = (64, 128, 256, 512, 768)
QWEN3_SMALLEST = 32


def prompts(checkpoint: Checkpoint, query_instruction: str | None = None) -> dict[str, str]:
    """The model's prompts by name: those of its files, else those of its card.

    `query_instruction` (QUERY_INSTRUCTION) replaces the task in the query prompt, or the whole of a prompt that has no
    place for one; a model without a query prompt was not trained with any and keeps none.
    """
    if checkpoint.task is Task.RERANK:
        return _instruction(checkpoint, query_instruction)
    card = next((prompts for pattern, prompts in PROMPTS if called(checkpoint, pattern)), {})
    found = {**FAMILY_PROMPTS.get(checkpoint.model_type, {}), **card}
    # Newer sentence-transformers write empty prompts where there are none.
    found |= {name: text for name, text in checkpoint.prompts.items() if text or name not in found}
    if query_instruction is not None and found.get("query"):
        template = instruction_template(found) or INSTRUCTION
        found["query"] = template.replace(INSTRUCTION, query_instruction)
    return found


def _instruction(checkpoint: Checkpoint, query_instruction: str | None) -> dict[str, str]:
    """A reranker's default instruction, under the name that sentence-transformers gives it."""
    if checkpoint.model_type != "qwen3":
        return {}
    return {"query": query_instruction or checkpoint.prompts.get("query") or DEFAULT_INSTRUCTION}


def instruction_template(prompts: Mapping[str, str]) -> str | None:
    """Where an instruction goes in the query prompt; None: the model has no such place."""
    match = INSTRUCT.match(prompts.get("query", ""))
    return f"Instruct: {INSTRUCTION}\nQuery:{match['space']}" if match else None


def supported_dimensions(checkpoint: Checkpoint, native: int) -> Sequence[int]:
    """Sizes that a vector may be cut to, the native one last (Matryoshka representation learning).

    The keys in config.json are vLLM's, so an owner can add them to a checkpoint that was trained so.
    """
    said = checkpoint.config.get("matryoshka_dimensions")
    if isinstance(said, list):
        return tuple(sorted({native, *(int(size) for size in said if 0 < int(size) <= native)}))
    if checkpoint.config.get("is_matryoshka"):
        return range(1, native + 1)
    if checkpoint.model_type == "qwen3":
        return range(min(QWEN3_SMALLEST, native), native + 1)
    if called(checkpoint, NOMIC_V1_5):
        return (*(size for size in NOMIC_V1_5_DIMENSIONS if size < native), native)
    return (native,)


def layer_norm_before_slice(checkpoint: Checkpoint) -> bool:
    """nomic's card norms the full vector, without weights, before it is cut."""
    return checkpoint.model_type == "nomic_bert"


def called(checkpoint: Checkpoint, pattern: str) -> bool:
    """Whether the last part of one of its names is the pattern."""
    return any(re.fullmatch(pattern, name.rsplit("/", 1)[-1], re.IGNORECASE) for name in checkpoint.names)
