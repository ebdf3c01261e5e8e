"""What several dialects share: the four shapes of an embedding input, and documents to rerank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, count, repeat
from operator import is_not
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from vecmill.core.errors import InvalidInput
from vecmill.core.types import EmbedResult, ScoreResult
from vecmill.http.bounds import check_count

FOUR_SHAPES = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"

Inputs = list[str] | list[list[int]]

# It goes before every text of a request, so its length counts as often as there are texts.
LONGEST_INSTRUCTION = 8192  # characters
DEEPEST_DOCUMENT = 64  # levels of lists and objects


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
    if type(value[0]) is int:
        return [_ids_of_one(value)]
    check_count(value)
    if dict in set(map(type, value)):
        return [_text_of(entry, index) for index, entry in enumerate(value)]
    # The first entry says which shape it is, the others must follow it.
    fits = _is_ids if _is_ids(value[0]) else _is_text
    for index, entry in enumerate(value):
        if not fits(entry):
            raise ValueError(f"{FOUR_SHAPES}; entry {index} does not fit")
    return value


def _ids_of_one(value: list[Any]) -> list[int]:
    """Many, perhaps: without a step in Python for each."""
    if not _is_ids(value):
        misfits = map(is_not, map(type, value), repeat(int))
        index = next(compress(count(), misfits), None)
        if index is None:
            index = value.index(max(value, key=abs))
        raise ValueError(f"{FOUR_SHAPES}; entry {index} does not fit")
    return value


def _text_of(entry: object, index: int) -> str:
    """Jina's objects."""
    if isinstance(entry, dict):
        _refuse_image(entry, index)
        entry = entry.get("text")
    if not isinstance(entry, str):
        raise ValueError(f"entry {index} must be a string or an object with a string `text`")
    return entry


def _refuse_image(entry: dict[str, Any], index: int) -> None:
    if any(entry.get(kind) for kind in ("image", "image_url", "audio", "video")):
        raise ValueError(f"entry {index} is not text; images, audio and video are not served here")


def _is_text(entry: object) -> bool:
    return isinstance(entry, str)


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


def _texts(value: Any) -> Any:
    """Texts alone, of the four shapes."""
    texts = parse_inputs(value)
    if texts and not isinstance(texts[0], str):
        raise ValueError("must be a string or a list of strings")
    return texts


def _ids(value: Any) -> Any:
    """Token ids alone, of the four shapes."""
    inputs = parse_inputs(value)
    if inputs and isinstance(inputs[0], str):
        raise ValueError("must be a list of token ids or a list of lists of token ids")
    return inputs


IDS_SCHEMA = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "array"}]}}
Texts = Annotated[
    Any,
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Ids = Annotated[Any, BeforeValidator(_ids), WithJsonSchema(IDS_SCHEMA)]


def parse_documents(value: Any) -> list[dict[str, Any]]:
    """Strings and objects, all as objects.

    Raises:
        ValueError: an entry is neither, or an image; the message names it.
    """
    if isinstance(value, str):  # vLLM takes a lone document
        value = [value]
    if not isinstance(value, list):
        raise ValueError("must be a list of strings or of objects with a `text`")
    check_count(value)
    documents = []
    for index, entry in enumerate(value):
        document = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(document, dict):
            raise ValueError(f"entry {index} must be a string or an object with a string `text`")
        _refuse_image(document, index)
        if _is_too_deep(document):
            raise ValueError(f"entry {index} is nested more than {DEEPEST_DOCUMENT} levels deep")
        documents.append(document)
    return documents


def _is_too_deep(document: dict[str, Any]) -> bool:
    """Of what is nested too deep neither a text nor JSON can be made."""
    level: list[Any] = [document]
    for _ in range(DEEPEST_DOCUMENT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


Documents = Annotated[
    list[Any],
    BeforeValidator(parse_documents),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, {"type": "object"}]},
            "description": "Texts, or objects whose `text` (or `rank_fields`) is scored and which come back whole.",
        }
    ),
]


def ranked_text(document: dict[str, Any], fields: Sequence[str] | None, param: str) -> str:
    """What of a document is scored: Cohere's `rank_fields` in their order, or `text`.

    Raises:
        InvalidInput: it has none of the fields, or its `text` is no string.
    """
    if not fields:
        if isinstance(document.get("text"), str):
            return str(document["text"])
        raise InvalidInput(
            f"`{param}` must be a string or an object with a string `text` (or `rank_fields`).", param=param
        )
    # Each once: a field that is named again and again must not make a text of many times the request's size.
    values = [str(document[field]) for field in dict.fromkeys(fields) if document.get(field) is not None]
    if values:
        return "\n".join(values)
    raise InvalidInput(f"`{param}` has none of the `rank_fields` ({', '.join(fields)[:200]}).", param=param)


def _not_served(value: Any) -> Any:
    """Refuse what would change the answer and cannot be done.

    Raises:
        ValueError: it is asked for.
    """
    if value:
        raise ValueError(
            "is not served here: this server embeds and reranks text, as one dense vector each; leave it out"
        )
    return value


NotServedHere = Annotated[Any, BeforeValidator(_not_served), Field(description="Not served here.")]


def _zero_is_unset(value: Any) -> Any:
    return None if value == 0 and not isinstance(value, bool) else value


# Infinity's client sends `dimensions: 0` for all, vLLM's `max_tokens_per_doc: 0` for no limit.
Dimensions = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(_zero_is_unset),
    Field(description="First so many values, normalised again; where the model is trained for it."),
]
Count = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_zero_is_unset)]


def usage(result: EmbedResult | ScoreResult) -> dict[str, object]:
    """OpenAI's token counts; those whose vectors were kept, and the inputs that were cut, where there are any."""
    counts: dict[str, object] = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    if result.cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": result.cached_tokens}
    return counts | ({"truncated": list(result.truncated)} if result.truncated else {})


def warnings(result: EmbedResult | ScoreResult) -> dict[str, list[str]]:
    """Cohere's note of the inputs that were cut, where there are any."""
    cut = ", ".join(map(str, result.truncated[:100]))
    return {"warnings": [f"truncated: {cut}"]} if cut else {}
