"""What answers the lines of a batch; given by the room above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vecmill.core.types import Caller


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    number: int
    """From 1."""
    custom_id: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LineResult:
    """What the endpoint answers to one line, as it would over HTTP."""

    status: int
    body: bytes
    """JSON."""
    tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that did not have to be computed."""
    model: str | None = None
    """The one that answered."""

    @property
    def ok(self) -> bool:
        """Whether it goes to the output, not to the errors."""
        return self.status < 400


class Endpoint(Protocol):
    """One of the API's endpoints. Belongs to the event loop's thread."""

    def texts(self, body: Mapping[str, Any]) -> int:
        """About how many texts a body has, whatever it holds; for any thread."""
        ...

    async def run(self, caller: Caller, lines: Sequence[Line]) -> Sequence[LineResult]:
        """Answer each line. Waits while the server has no room; raises nothing but what is a fault of its own.

        `caller`: the batch, which takes turns as a job of whoever created it, in the bulk lane whatever its lines say.
        """
        ...
