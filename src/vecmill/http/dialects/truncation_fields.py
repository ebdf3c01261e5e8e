"""All the ways in which clients say what is to happen to a text that is too long."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from vecmill.core.errors import InvalidInput
from vecmill.core.types import Side, Truncation
from vecmill.http.bounds import Word

# NIM's and Cohere's words.
WORDS = {"END": (True, Side.RIGHT), "START": (True, Side.LEFT), "NONE": (False, None)}


def parse_truncate(value: Any) -> Any:
    """The word in capitals; anything else is a boolean.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) and value.upper() in WORDS:
        return value.upper()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("must be true, false, NONE, START or END")


def parse_side(value: Any) -> Any:
    """`left` or `right` in any case."""
    return value.lower() if isinstance(value, str) else value


OneSide = Annotated[Side | None, BeforeValidator(parse_side), Word]


class TruncationFields(BaseModel):
    """Of several that are given, the first here wins. None: AUTO_TRUNCATE decides, and what the model's
    tokenizer cuts is cut: the end, unless its files say the beginning."""

    truncate: Annotated[
        str | bool | None,
        BeforeValidator(parse_truncate),
        Word,
        Field(
            description="What is too long is cut (true, or Cohere's and NIM's `END`; `START` cuts the beginning) or "
            "refused (false, `NONE`). Default: AUTO_TRUNCATE."
        ),
    ] = None
    truncation: bool | None = Field(None, description="Voyage: the same as true or false.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="vLLM: cut to so many tokens, special tokens included; -1: to the model's length."
    )
    truncation_side: OneSide = Field(None, description="vLLM: the side that is cut, `left` or `right`.")
    truncation_direction: OneSide = Field(None, description="TEI: the same, `Left` or `Right`.")

    def asked_truncation(self, default: bool | None = None, max_tokens: int | None = None) -> Truncation:
        """What the request says; `default` where it says nothing.

        Raises:
            InvalidInput: `truncate_prompt_tokens` is 0.
        """
        if self.truncate_prompt_tokens == 0:
            raise InvalidInput("`truncate_prompt_tokens` must be at least 1, or -1.", param="truncate_prompt_tokens")
        allowed, side = default, self.truncation_side or self.truncation_direction
        if isinstance(self.truncate, str):
            allowed, side = WORDS[self.truncate]
        elif self.truncate is not None:
            allowed = self.truncate
        elif self.truncation is not None:
            allowed = self.truncation
        elif self.truncate_prompt_tokens is not None:
            allowed = True
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens > 0:
            max_tokens = self.truncate_prompt_tokens
        return Truncation(allowed, side, max_tokens)
