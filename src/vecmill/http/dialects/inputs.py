"""What several dialects share: the four shapes of an embedding input, and documents to rerank."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from vecmill.core.types import EmbedResult

FOUR_SHAPES = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"

Inputs = list[str] | list[list[int]]

# It goes before every text of a request, so its length counts as often as there are texts.
LONGEST_INSTRUCTION = 8192  # characters


def parse_inputs(value: Any) -> Inputs:
    """Any of the four shapes as one of two.

    Raises:
        ValueError: it is none of them; the message names the entry.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(FOUR_SHAPES)
    if not value:
        return []
    if _is_ids(value):
        return [value]
    # The first entry says which shape it is, the others must follow it.
    fits = next((fits for fits in (_is_text, _is_id, _is_ids) if fits(value[0])), _is_text)
    for index, entry in enumerate(value):
        if not fits(entry):
            raise ValueError(f"{FOUR_SHAPES}; entry {index} does not fit")
    return value


def _is_text(entry: object) -> bool:
    return isinstance(entry, str)


def _is_id(entry: object) -> bool:
    return isinstance(entry, int) and not isinstance(entry, bool) and abs(entry) < 2**31


def _is_ids(entry: object) -> bool:
    """Without a step in Python for each: there may be millions."""
    if not isinstance(entry, list) or not set(map(type, entry)) <= {int}:
        return False
    return not entry or -(2**31) < min(entry) <= max(entry) < 2**31


EmbeddingInputs = Annotated[
    Any,
    BeforeValidator(parse_inputs),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ],
            "description": "A text, texts, the token ids of one text, or those of several.",
        }
    ),
]


def parse_truncate(value: Any) -> Any:
    """NIM's and Cohere's words for what others say with true and false.

    Raises:
        ValueError: `START`: texts are cut at their end only.
    """
    if not isinstance(value, str):
        return value
    if value.upper() == "START":
        raise ValueError("texts can only be cut at their end; send END, or NONE to refuse long ones")
    return {"END": True, "NONE": False}.get(value.upper(), value)


Truncate = Annotated[
    bool | None,
    BeforeValidator(parse_truncate),
    Field(description="Cut what is too long (true, `END`), or refuse it (false, `NONE`). Default: AUTO_TRUNCATE."),
]


def parse_documents(value: Any) -> list[dict[str, Any]]:
    """Strings and objects with a `text`, all as objects.

    Raises:
        ValueError: an entry is neither; the message names it.
    """
    if not isinstance(value, list):
        raise ValueError("must be a list of strings or of objects with a `text`")
    documents = []
    for index, entry in enumerate(value):
        document = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise ValueError(f"entry {index} must be a string or an object with a string `text`")
        documents.append(document)
    return documents


Documents = Annotated[
    list[Any],
    BeforeValidator(parse_documents),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, {"type": "object", "required": ["text"]}]},
            "description": "Texts, or objects whose `text` is scored and which come back whole.",
        }
    ),
]


def usage(result: EmbedResult) -> dict[str, object]:
    """OpenAI's token counts; `truncated` lists the inputs that were cut, where there are any."""
    counts: dict[str, object] = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    return counts | ({"truncated": list(result.truncated)} if result.truncated else {})
