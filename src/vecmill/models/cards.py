"""What model cards prescribe and checkpoints leave out: prompts, instructions, dimensions. Reads no tensors.

Sources: the cards at https://huggingface.co, each under the name that its pattern matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vecmill.core.types import PromptSource, Task
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
    if query_instruction is None or not query or checkpoint.task is Task.RERANK:
        return found
    template = instruction_template(found.by_name) or INSTRUCTION
    changed = {**found.by_name, "query": template.replace(INSTRUCTION, query_instruction)}
    return replace(found, by_name=changed)


def _found(checkpoint: Checkpoint) -> Prompts:
    if checkpoint.prompts or checkpoint.default_prompt_name:
        return Prompts(checkpoint.prompts, checkpoint.default_prompt_name, "files")
    card = next((prompts for owner, name, prompts in PROMPTS if called(checkpoint, owner, name)), None)
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
    if called(checkpoint, *NOMIC_V1_5):
        return (*(size for size in NOMIC_V1_5_DIMENSIONS if size < native), native)
    return (native,)


def layer_norm_before_slice(checkpoint: Checkpoint) -> bool:
    """nomic-embed-text-v1.5's card norms the full vector, without weights, before it is cut."""
    return called(checkpoint, *NOMIC_V1_5)


def called(checkpoint: Checkpoint, owner: str, name: str) -> bool:
    """Whether its id is the owner's model of that name, or it is a folder that is named so.

    `_name_or_path` in config.json does not count: a fine-tune has that of the model that it was made from.
    """
    *owners, last = checkpoint.id.split("/")
    return (not owners or owners[-1].casefold() == owner.casefold()) and bool(re.fullmatch(name, last, re.IGNORECASE))
