"""The examples of model cards with the numbers that they print, for `vecmill verify`. Reads no tensors.

`card_examples.json` beside it holds the texts and numbers, and for each where it is from.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, TypeAdapter, model_validator

from vecmill.core.types import ModelCard, Task
from vecmill.hardware.gpu import FLOAT8
from vecmill.models.keys import read_json

Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Numbers = tuple[tuple[float, ...], ...]


FLOAT8_TIMES = 8  # as far off as bfloat16, of all-MiniLM-L6-v2's vectors


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Tolerance(_Part):
    """How far a number may be off, by the type of the weights."""

    float32: PositiveFloat
    float16: PositiveFloat
    bfloat16: PositiveFloat

    def of(self, card: ModelCard) -> float:
        """For a loaded model."""
        of_type = {"float32": self.float32, "float16": self.float16, "bfloat16": self.bfloat16}
        return {**of_type, FLOAT8: FLOAT8_TIMES * self.bfloat16}[card.dtype]


class ScoreCheck(_Part):
    """Every query against every document: cosines of an embedder, raw scores of a reranker."""

    kind: Literal["scores"]
    source: str
    queries: Texts
    documents: Texts
    prompted: bool = False
    """Whether an embedder's texts are sent as queries and documents, so with its prompts."""
    instruction: str | None = None
    """The task of the queries, in place of the prompt's own."""
    scale: PositiveFloat = 1.0
    """What the card multiplies its scores by."""
    expected: Numbers
    """One row per query."""
    tolerance: Tolerance

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if [len(row) for row in self.expected] != [len(self.documents)] * len(self.queries):
            raise ValueError("expected needs a row per query and a number per document")
        return self


class VectorCheck(_Part):
    """Texts without a prompt and the unit vectors that another server's tests store; they are compared by cosine."""

    kind: Literal["vectors"]
    source: str
    texts: Texts
    vectors: Numbers
    tolerance: Tolerance

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(self.vectors) != len(self.texts) or len({len(vector) for vector in self.vectors}) != 1:
            raise ValueError("vectors needs one per text, all of one size")
        return self


class Example(_Part):
    """The checks of one model."""

    model: str
    """Its id on the hub."""
    task: Task
    checks: Annotated[tuple[Annotated[ScoreCheck | VectorCheck, Field(discriminator="kind")], ...], Field(min_length=1)]


@lru_cache(maxsize=1)
def examples() -> tuple[Example, ...]:
    """All of them."""
    text = resources.files("vecmill.models").joinpath("card_examples.json").read_bytes()
    return TypeAdapter(tuple[Example, ...]).validate_json(text)


def find_example(names: Iterable[str]) -> Example | None:
    """The example of the first name that has one; the last part of a name counts, in any case."""
    known = {_last_part(example.model): example for example in examples()}
    return next((known[part] for part in map(_last_part, names) if part in known), None)


def names_of(model: str) -> tuple[str, ...]:
    """What a model may be called before it is loaded: its id or folder, and where the folder's files were made.

    Raises:
        StartupError: the folder's config.json is not JSON.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return (model,)
    return (folder.resolve().name, str(read_json(model, folder / "config.json").get("_name_or_path", "")))


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1].casefold()
