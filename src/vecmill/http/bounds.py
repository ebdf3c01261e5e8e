"""How many entries the lists and mappings of a request may have: counted before any of them is validated.

Every list and mapping of a body's model is one of these, so that neither a million entries nor a million mistakes cost
more than their parsing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")

TOO_MANY_INPUTS = "too_many_inputs"

# MAX_CLIENT_BATCH_SIZE of the server that validates: FastAPI hands validators nothing else of the request.
most_inputs: ContextVar[int] = ContextVar("most_inputs", default=2048)


@contextmanager
def at_most(inputs: int) -> Iterator[None]:
    """Validate for a server that takes so many inputs in a request."""
    token = most_inputs.set(inputs)
    try:
        yield
    finally:
        most_inputs.reset(token)


def check_count(value: Any) -> Any:
    """The value, which if it is a list has no more entries than a request may have inputs.

    Raises:
        PydanticCustomError: it has more.
    """
    if isinstance(value, list) and len(value) > (most := most_inputs.get()):
        raise PydanticCustomError(
            TOO_MANY_INPUTS,
            "has {count} entries, {most} are possible (MAX_CLIENT_BATCH_SIZE); split the request",
            {"count": len(value), "most": most},
        )
    return value


Counted = BeforeValidator(check_count)
"""For what is made into a list by a validator that stands before this one."""

InputList = Annotated[list[T], Field(fail_fast=True), Counted]
"""Inputs, or what there is one of for each input."""

LONGEST_WORD = 256  # characters


def check_word(value: Any) -> Any:
    """The value, which if it is a string is as long as a word that means something to the server at the most.

    Raises:
        ValueError: it is longer.
    """
    if isinstance(value, str) and len(value) > LONGEST_WORD:
        raise ValueError(f"has {len(value)} characters, {LONGEST_WORD} are possible")
    return value


Word = BeforeValidator(check_word)
"""Stands after the validators that read one of a few words, so that it comes before them."""
