"""The models that requests can name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from vecmill.core.errors import ModelNotFound
from vecmill.core.types import ModelCard
from vecmill.inference.pairs import PairTokenizer
from vecmill.inference.tokenization import TextTokenizer
from vecmill.models.cards import aliases_of, with_aliases

Aliases = Sequence[tuple[str, str]]

# NIM's clients say so what a text is: `nvidia/nv-embedqa-e5-v5-query`.
ROLE_SUFFIXES = {"-query": True, "-passage": False, "-document": False}


@dataclass(frozen=True, slots=True)
class ServedEmbedder:
    """An embedding model."""

    key: str
    """What the scheduler calls it."""
    card: ModelCard
    tokenizer: TextTokenizer
    fingerprint: bytes
    """What the cache calls it."""


@dataclass(frozen=True, slots=True)
class ServedReranker:
    """A reranker."""

    key: str
    card: ModelCard
    tokenizer: PairTokenizer


S = TypeVar("S", bound=ServedEmbedder | ServedReranker)


class Names(Generic[S]):
    """Models of one task by every name they have, the default first."""

    def __init__(self, models: Sequence[S]) -> None:
        self.models = models
        self.by_name = {name: model for model in models for name in (model.card.id, *model.card.aliases)}

    def only(self) -> S | None:
        """The model, where there is one."""
        return self.models[0] if len(self.models) == 1 else None


class ServedModels:
    """Finds the model of a request."""

    def __init__(
        self, embedders: Sequence[ServedEmbedder], rerankers: Sequence[ServedReranker], *, strict: bool
    ) -> None:
        """The first of each is its default. Only `vecmill verify` loads a reranker without any embedder."""
        self._embedders, self._rerankers = Names(embedders), Names(rerankers)
        self._strict = strict

    def __iter__(self) -> Iterator[ServedEmbedder | ServedReranker]:
        """All models, embedders first."""
        yield from self._embedders.models
        yield from self._rerankers.models

    def renamed(self, before: Aliases, now: Aliases) -> ServedModels:
        """The same models with other MODEL_ALIASES.

        Raises:
            StartupError: an alias is another model's name, or of none that is loaded.
        """
        given = {alias for alias, _ in before}
        own = {name: one.id for one in self.cards for name in (one.id, *one.aliases) if name not in given}
        known = with_aliases(own, now)

        def rename(model: S) -> S:
            return replace(model, card=replace(model.card, aliases=aliases_of(model.card.id, known)))

        embedders, rerankers = self._embedders.models, self._rerankers.models
        return ServedModels(list(map(rename, embedders)), list(map(rename, rerankers)), strict=self._strict)

    @property
    def cards(self) -> list[ModelCard]:
        """The card of each."""
        return [model.card for model in self]

    def embedder(self, name: str | None) -> tuple[ServedEmbedder, bool | None]:
        """The embedder that answers to `name`, and whether the name says that the texts are queries.

        Itself, the default for None, the only one for any name unless STRICT_MODEL; a role suffix comes off.

        Raises:
            ModelNotFound: there is none.
        """
        if not name:
            return self._embedders.models[0], None
        if name in self._embedders.by_name:
            return self._embedders.by_name[name], None
        stem, is_query = _role(name)
        found = self._embedders.by_name.get(stem)
        if found is None and not self._strict and name not in self._rerankers.by_name:
            found = self._embedders.only()
        if found is None:
            raise self._not_found(name, self._embedders, "embedding models")
        return found, is_query

    def any(self, name: str | None) -> ServedEmbedder | ServedReranker:
        """An embedder as `embedder` finds it, or the reranker of that name.

        Raises:
            ModelNotFound: there is none.
        """
        if name and name not in self._embedders.by_name and name in self._rerankers.by_name:
            return self._rerankers.by_name[name]
        return self.embedder(name)[0]

    def reranker(self, name: str | None) -> ServedReranker | ServedEmbedder:
        """What ranks for `name`: a reranker, or an embedder where one is named or no reranker is loaded.

        Raises:
            ModelNotFound: there is none.
        """
        if name and name in self._rerankers.by_name:
            return self._rerankers.by_name[name]
        if name and name in self._embedders.by_name:
            return self._embedders.by_name[name]
        if not self._rerankers.models:
            return self.embedder(name)[0]
        if name and (self._strict or not self._rerankers.only()):
            raise self._not_found(name, self._rerankers, "rerankers")
        return self._rerankers.models[0]

    def _not_found(self, name: str, names: Names[S], kind: str) -> ModelNotFound:
        known = ", ".join(names.by_name)
        return ModelNotFound(f"The model `{name[:200]}` does not exist here; {kind} are: {known}.", param="model")


def _role(name: str) -> tuple[str, bool | None]:
    for suffix, is_query in ROLE_SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), is_query
    return name, None
