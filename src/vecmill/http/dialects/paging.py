"""OpenAI's lists: a page of them, and where the next begins.

Source: https://platform.openai.com/docs/api-reference/batch/list
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Query

from vecmill.core.errors import InvalidInput


class Identified(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Identified)

After = Annotated[str | None, Query(description="The id after which the page begins: the last of the page before.")]


def page(items: Sequence[T], view: Callable[[T], dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """The page after an id.

    Raises:
        InvalidInput: there is no such id.
    """
    start = 0
    if after:  # empty: from the beginning, as some clients say it
        start = 1 + next((place for place, item in enumerate(items) if item.id == after), -1)
        if start == 0:
            raise InvalidInput("`after` is no id of this list.", param="after")
    shown = items[start : start + limit]
    return {
        "object": "list",
        "data": [view(item) for item in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": start + limit < len(items),
    }
