"""Which of the model's own prompts goes before a text."""

from __future__ import annotations

from vecmill.core.errors import InvalidInput
from vecmill.core.types import ModelCard

# sentence-transformers' encode_query and encode_document look for these names, in this order.
QUERY_NAMES = ("query",)
DOCUMENT_NAMES = ("document", "passage", "corpus")


def choose_prompt(card: ModelCard, prompt_name: str | None, is_query: bool | None) -> str:
    """The prompt by name, else by role, else none: a plain request is embedded as it is.

    Raises:
        InvalidInput: the model has no prompt of that name.
    """
    if prompt_name is not None:
        if prompt_name not in card.prompts:
            known = ", ".join(sorted(card.prompts)) or "none"
            raise InvalidInput(
                f"`prompt_name` {prompt_name!r} is not a prompt of {card.id}; it has: {known}.",
                param="prompt_name",
            )
        return card.prompts[prompt_name]
    if is_query is None:
        return ""
    names = QUERY_NAMES if is_query else DOCUMENT_NAMES
    return next((card.prompts[name] for name in names if name in card.prompts), "")


def with_prompt(prompt: str, text: str) -> str:
    """Clients that prefix by themselves are not prefixed twice."""
    return text if text.startswith(prompt) else prompt + text
