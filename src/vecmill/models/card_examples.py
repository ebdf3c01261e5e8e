"""Numbers that are published of models, for `vecmill verify`. Reads no tensors.

`card_examples.json` beside it holds texts and numbers of model cards and of other servers' tests;
`reference_scores.json` has tables, above all of sentence-transformers' own tests, in which many models are asked about
the same texts. Each says where it is from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        of_type = {"float32": self.float32, "float16": self.float16, FLOAT8: FLOAT8_TIMES * self.bfloat16}
        return of_type.get(card.dtype, self.bfloat16)


class ScoreCheck(_Part):
    """Every query against every document: cosines of an embedder, raw scores of a reranker."""

    kind: Literal["scores"]
    source: str
    queries: Texts
    documents: Texts
    prompted: bool | Literal["files"] = False
    """Whether an embedder's texts are sent as queries and documents, so with its prompts. "files": only with those of
    its files, as `encode_query` of sentence-transformers does, which does not know those that only the card names."""
    measure: Literal["raw", "relevance", "similarity"] = "raw"
    """raw: cosines, or a reranker's logits. relevance: these between 0 and 1. similarity: by the model's own
    function."""
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


class ComponentCheck(_Part):
    """Texts without a prompt and the first components of their unit vectors; the largest difference counts."""

    kind: Literal["components"]
    source: str
    texts: Texts
    components: Numbers
    tolerance: Tolerance

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(self.components) != len(self.texts) or not all(self.components):
            raise ValueError("components needs some per text")
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


Check = Annotated[ScoreCheck | VectorCheck | ComponentCheck, Field(discriminator="kind")]


class Example(_Part):
    """The checks of one model."""

    model: str
    """Its id on the hub."""
    task: Task
    checks: Annotated[tuple[Check, ...], Field(min_length=1)]


class _Table(_Part):
    """Scores of many models."""

    source: str
    task: Task
    prompted: bool | Literal["files"] = False
    measure: Literal["raw", "relevance", "similarity"] = "raw"
    tolerance: Tolerance
    scores: dict[str, tuple[float, ...]]
    """By the model's id, one per document."""


class ComparedTexts(_Part):
    """One query and its documents, and what models make of them."""

    query: str
    documents: Texts
    tables: tuple[_Table, ...]

    def examples(self) -> Iterator[Example]:
        """One for each model of each table."""
        for table in self.tables:
            shared = {
                "kind": "scores",
                "queries": (self.query,),
                "documents": self.documents,
                **table.model_dump(include={"source", "prompted", "measure", "tolerance"}),
            }
            for model, scores in table.scores.items():
                check = ScoreCheck.model_validate({**shared, "expected": (scores,)})
                yield Example(model=model, task=table.task, checks=(check,))


@lru_cache(maxsize=1)
def examples() -> tuple[Example, ...]:
    """All of them, one for each model."""
    of_cards = TypeAdapter(tuple[Example, ...]).validate_json(_read("card_examples.json"))
    by_model = {example.model: example for example in of_cards}
    for more in compared_texts().examples():
        known = by_model.get(more.model)
        checks = (*known.checks, *more.checks) if known is not None else more.checks
        by_model[more.model] = more.model_copy(update={"checks": checks})
    return tuple(by_model.values())


@lru_cache(maxsize=1)
def compared_texts() -> ComparedTexts:
    """The texts that models of one table are compared by."""
    return ComparedTexts.model_validate_json(_read("reference_scores.json"))


def _read(name: str) -> bytes:
    return resources.files("vecmill.models").joinpath(name).read_bytes()


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
