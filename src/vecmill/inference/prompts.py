"""Which prompt goes before a request's texts."""

from __future__ import annotations

from vecmill.core.errors import InvalidInput
from vecmill.core.types import INSTRUCTION_PLACE, ModelCard, PromptChoice, Task

# sentence-transformers' encode_query and encode_document look for these names, in this order.
QUERY_NAMES = ("query",)
DOCUMENT_NAMES = ("document", "passage", "corpus")


def choose_prompt(card: ModelCard, choice: PromptChoice) -> str:
    """The instruction, else the prompt by name, else by role, else the model's default prompt, if it has one.

    As sentence-transformers has it: a role without a prompt is no prompt, and not the default one.

    Raises:
        InvalidInput: the model has no prompt of that name.
    """
    if choice.instruction is not None:
        return _instructed(card, choice.instruction)
    if choice.prompt_name is not None:
        return _named(card, choice.prompt_name)
    if choice.task is not None:
        return card.prompts.get(choice.task, "")
    if choice.is_query is None:
        return _default(card)
    return _first(card, QUERY_NAMES if choice.is_query else DOCUMENT_NAMES)


def _instructed(card: ModelCard, instruction: str) -> str:
    """In the model's own template; as it is where there is none, or where it is written out already."""
    if card.instruction_template is None or not instruction or instruction.startswith("Instruct: "):
        return instruction
    return card.instruction_template.replace(INSTRUCTION_PLACE, instruction)


def _named(card: ModelCard, name: str) -> str:
    if name in card.prompts:
        return card.prompts[name]
    if name in QUERY_NAMES or name in DOCUMENT_NAMES:  # every sentence-transformers model has these, empty or not
        return _first(card, QUERY_NAMES if name in QUERY_NAMES else DOCUMENT_NAMES)
    known = ", ".join(sorted({*card.prompts, QUERY_NAMES[0], DOCUMENT_NAMES[0]}))
    raise InvalidInput(
        f"`prompt_name` {name[:100]!r} is not a prompt of {card.id}; these are: {known}.", param="prompt_name"
    )


def _default(card: ModelCard) -> str:
    if card.task is Task.RERANK or card.default_prompt_name is None:  # a reranker's is its instruction
        return ""
    return card.prompts.get(card.default_prompt_name, "")


def _first(card: ModelCard, names: tuple[str, ...]) -> str:
    return next((card.prompts[name] for name in names if name in card.prompts), "")


def missing_prompt(prompt: str, text: str) -> str:
    """What still has to go before a text: clients that prefix by themselves are not prefixed twice."""
    return "" if text.startswith(prompt) else prompt


def asks_for_query(choice: PromptChoice) -> bool:
    """Whether the texts are queries, by whichever field says so."""
    named = f"{choice.prompt_name or ''} {choice.task or ''}".lower()
    return bool(choice.is_query) or "query" in named
