"""What model cards prescribe and checkpoints leave out: prompts, instructions, dimensions. Reads no tensors.

Sources: the cards at https://huggingface.co, each under the name that its pattern matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vecmill.core.types import PromptSource, Task
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import DEFAULT_INSTRUCTION, QWEN3_PROMPT, rerank_form

BGE_EN = "Represent this sentence for searching relevant passages: "
BGE_ZH = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001  # as the card has it
NOMIC = {
    "query": "search_query: ",
    "document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}

QWEN3_EMBEDDING = {"query": f"Instruct: {DEFAULT_INSTRUCTION}\nQuery:", "document": ""}
NV_EMBED = {
    "query": "Instruct: Given a question, retrieve passages that answer the question\nQuery: ",
    "document": "",
}

# By the model's id: the owner, and the name. The first that matches.
PROMPTS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("BAAI", r"bge-(small|base|large)-en(-v1\.5)?", {"query": BGE_EN}),
    ("BAAI", r"bge-(small|base|large)-zh(-v1\.5)?", {"query": BGE_ZH}),
    ("intfloat", r"(multilingual-)?e5-(small|base|large)(-v2)?", {"query": "query: ", "document": "passage: "}),
    (
        "intfloat",
        r"multilingual-e5-large-instruct",
        {"query": f"Instruct: {DEFAULT_INSTRUCTION}\nQuery: ", "document": ""},
    ),
    ("Qwen", r"Qwen3-Embedding-[\d.]+B", QWEN3_EMBEDDING),
    ("nvidia", r"NV-Embed-v[12]", NV_EMBED),
    ("nomic-ai", r"nomic-embed-text-v1(\.5)?", NOMIC),
)
INSTRUCT = re.compile(r"^Instruct: (?P<instruction>.*)\nQuery:(?P<space> ?)$", re.DOTALL)
INSTRUCTION = "{instruction}"

NOMIC_V1_5 = ("nomic-ai", r"nomic-embed-text-v1\.5")
NOMIC_V1_5_DIMENSIONS = (64, 128, 256, 512, 768)
QWEN3_SMALLEST = 32


@dataclass(frozen=True, slots=True)
class Prompts:
    """What goes before a model's texts."""

    by_name: Mapping[str, str]
    default_name: str | None = None
    """Of the one that goes before a text of which nothing is said."""
    source: PromptSource | None = None
    """None: it has none."""


def prompts(checkpoint: Checkpoint, query_instruction: str | None = None) -> Prompts:
    """The model's prompts: those of its files, the empty ones included, else those of its card.

    `query_instruction` (QUERY_INSTRUCTION) replaces the task in the query prompt, or the whole of a prompt that has no
    place for one; a model without a query prompt was not trained with any and keeps none.
    """
    found = _found(checkpoint)
    query = found.by_name.get("query")
    if query_instruction is None:
        return found
    if checkpoint.task is Task.RERANK:
        return _instructed(checkpoint, found, query_instruction)
    if not query:
        return found
    template = instruction_template(found.by_name) or INSTRUCTION
    return replace(found, by_name={**found.by_name, "query": template.replace(INSTRUCTION, query_instruction)})


def _instructed(checkpoint: Checkpoint, found: Prompts, instruction: str) -> Prompts:
    """A reranker's default prompt is its instruction, where it takes one."""
    prompt = rerank_form(checkpoint).prompt
    if prompt is None or not prompt.takes_instruction:
        return found
    name = found.default_name or "query"
    return replace(found, by_name={**found.by_name, name: instruction}, default_name=name)


def _found(checkpoint: Checkpoint) -> Prompts:
    if checkpoint.prompts or checkpoint.default_prompt_name:
        return Prompts(checkpoint.prompts, checkpoint.default_prompt_name, "files")
    if checkpoint.task is Task.RERANK:
        own = rerank_form(checkpoint).prompt is QWEN3_PROMPT
        return Prompts({"query": DEFAULT_INSTRUCTION}, "query", "card") if own else Prompts({})
    card = next((prompts for owner, name, prompts in PROMPTS if checkpoint.is_called(owner, name)), None)
    return Prompts({}) if card is None else Prompts(card, source="card")


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
    if checkpoint.is_called(*NOMIC_V1_5):
        return (*(size for size in NOMIC_V1_5_DIMENSIONS if size < native), native)
    return (native,)


def layer_norm_before_slice(checkpoint: Checkpoint) -> bool:
    """nomic-embed-text-v1.5's card norms the full vector, without weights, before it is cut."""
    return checkpoint.is_called(*NOMIC_V1_5)
