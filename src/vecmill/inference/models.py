"""The models that requests can name, and what each does with a request: its cost, its rows, its result."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar, cast

import numpy as np

from vecmill.cache.embedding_cache import model_fingerprint
from vecmill.config import InferenceSettings
from vecmill.core.errors import ModelNotFound, StartupError
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import (
    EmbedRequest,
    EmbedResult,
    ModelCard,
    PromptChoice,
    ScoreRequest,
    ScoreResult,
    Task,
    TokenVocabulary,
    Truncation,
)
from vecmill.inference.cache_lookup import CachedRow, CacheLookup, CachePolicy
from vecmill.inference.pair_tokenizer import CrossEncoderTokenizer, InstructTokenizer, PairLimits, PairTokenizer
from vecmill.inference.schedule import RequestRows, RowResults, RunOptions
from vecmill.inference.text_tokenizer import (
    TextTokenizer,
    Tokenized,
    asks_for_query,
    choose_adapter,
    choose_prompt,
)
from vecmill.inference.token_ids import cl100k, texts_of_ids
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.inference.vectors import finish_vectors, logit_to_relevance, similarities, similarity_to_relevance
from vecmill.models.cards import aliases_of, with_aliases
from vecmill.models.chat_template import UnfitTemplateError
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import padding_token, rerank_form
from vecmill.models.tokenizer_files import ReadTokenizer

Aliases = Sequence[tuple[str, str]]

# NIM's clients say so what a text is: `nvidia/nv-embedqa-e5-v5-query`.
ROLE_SUFFIXES = {"-query": True, "-passage": False, "-document": False}
SPECIAL_TOKENS = 2  # of a text, for the estimate
PAIR_TOKENS = 128  # around a query and a document, for the estimate
BYTES_PER_VALUE = 4 + 4  # of a vector as it comes from the device, and as it is finished

Request = TypeVar("Request", EmbedRequest, ScoreRequest)
Result = TypeVar("Result", EmbedResult, ScoreResult)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request will take, estimated before any work is done for it."""

    tokens: int
    """At most in practice: one for each character or id, cut at the model's length."""
    result_bytes: int = 0
    """Memory of its vectors, at most."""


class Answering(ABC, Generic[Request, Result]):
    """A model's part in one kind of request. The facade runs the rows between `tokenize` and `finish`."""

    card: ModelCard

    @abstractmethod
    def cost(self, request: Request) -> Cost:
        """Estimate the request.

        Raises:
            InvalidInput: the model has no prompt of the name that is asked for, or no weights for that task.
        """

    @abstractmethod
    async def tokenize(self, request: Request, options: RunOptions, cache: CachePolicy) -> RequestRows:
        """The request's inputs as rows for the model, or as vectors from the cache.

        Raises:
            InvalidInput: an input cannot be read, or a limit of the request leaves no room for it.
        """

    @abstractmethod
    def finish(self, request: Request, results: RowResults) -> Result:
        """The answer, from what the model gave for each row. It may be called in a worker thread."""


@dataclass(frozen=True, slots=True)
class Embedder(Answering[EmbedRequest, EmbedResult]):
    """An embedding model: texts to vectors."""

    card: ModelCard
    loaded_tokenizer: TextTokenizer | None
    """None while the model is not loaded."""
    fingerprint: bytes
    """What the cache calls it."""
    token_ids: TokenVocabulary
    """Whose token ids clients send, where a request does not say it (TOKEN_IDS)."""
    threads: WorkerThreads
    is_guest: bool = False
    """Not of the settings: it answers to its names alone."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer; to be asked for while the model is held (`Residency.hold`)."""
        assert self.loaded_tokenizer is not None
        return self.loaded_tokenizer

    def unloaded(self) -> Embedder:
        """The same model without what takes memory."""
        return replace(self, loaded_tokenizer=None)

    @property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        """The special tokens before and after a text."""
        return self.tokenizer.around

    def cost(self, request: EmbedRequest) -> Cost:
        """See `Answering`."""
        prompt = choose_prompt(self.card, request.prompt)
        return self.cost_of(request.inputs, len(prompt))

    def cost_of(self, inputs: Sequence[str] | Sequence[Sequence[int]], around: int) -> Cost:
        """Of texts or token ids with `around` characters around each."""
        tokens = estimated_tokens(self.card, inputs, around + SPECIAL_TOKENS)
        return Cost(tokens, len(inputs) * (self.card.dimensions or 1) * BYTES_PER_VALUE)

    async def tokenize(self, request: EmbedRequest, options: RunOptions, cache: CachePolicy) -> RequestRows:
        """See `Answering`."""
        prompt = choose_prompt(self.card, request.prompt)
        lookup = self.lookup(options, cache, is_query=asks_for_query(request.prompt))
        if isinstance(request.inputs[0], str):
            texts = cast(Sequence[str], request.inputs)
            adapter = choose_adapter(self.card, request.prompt)
            inputs = await self.tokenize_texts(texts, prompt, request.truncation, lookup, adapter)
        else:
            inputs = await self._tokenize_ids(request, prompt, options, lookup)
        return RequestRows(inputs, entries(request.param))

    def lookup(self, options: RunOptions, cache: CachePolicy, *, is_query: bool) -> CacheLookup | None:
        """How texts of a request are looked up in the cache; None where it is not used."""
        return cache.lookup(self.card, self.fingerprint, options.caller, is_query=is_query, truncate=options.truncate)

    async def tokenize_texts(
        self,
        texts: Sequence[str],
        prompt: str,
        truncation: Truncation,
        lookup: CacheLookup | None,
        adapter: int | None = None,
    ) -> list[Tokenized | CachedRow]:
        """A row for each text, or its vector from the cache.

        Raises:
            InvalidInput: the request's limit leaves no room for any text.
        """
        encode = await self.tokenizer.encoder(prompt, truncation, adapter)
        if lookup is None:
            return [*await self.tokenizer.pool.map(encode, texts)]
        return await self.tokenizer.pool.map(lookup.cached_encoder(encode, prompt, truncation, adapter), texts)

    async def _tokenize_ids(
        self, request: EmbedRequest, prompt: str, options: RunOptions, lookup: CacheLookup | None
    ) -> list[Tokenized | CachedRow]:
        """Ids of another vocabulary are read as the texts they stand for; the model's own are run as they are."""
        ids = cast(Sequence[Sequence[int]], request.inputs)
        adapter = choose_adapter(self.card, request.prompt)
        whose = request.token_vocabulary or self.token_ids
        side = self.tokenizer.side(request.truncation)
        truncation = replace(request.truncation, allowed=options.truncate, side=side)
        size = sum(map(len, ids))
        read = partial(texts_of_ids, whose, ids, self.tokenizer.pool, request.param, truncation)
        decoded = await self.threads.run_if_large(read, size=size)
        if decoded is not None:
            inputs = await self.tokenize_texts(decoded.texts, prompt, request.truncation, lookup, adapter)
            return [row.marked_as_cut() if index in decoded.cut else row for index, row in enumerate(inputs)]
        check = partial(self.tokenizer.check, ids, request.param, request.truncation, adapter)
        rows = await self.threads.run_if_large(check, size=size)
        if lookup is None:
            return [*rows]
        return await self.threads.run(partial(lookup.look_up_rows, rows), size=size)

    def finish(self, request: EmbedRequest, results: RowResults) -> EmbedResult:
        """See `Answering`."""
        embeddings = finish_vectors(
            results.vectors, request.dimensions, request.normalize, layer_norm=self.card.layer_norm_before_slice
        )
        return EmbedResult(
            embeddings,
            self.card.id,
            results.prompt_tokens,
            results.truncated,
            results.timings,
            results.tokens,
            results.reported_hits,
        )


@dataclass(frozen=True, slots=True)
class Reranker(Answering[ScoreRequest, ScoreResult]):
    """A model that reads a query and a document together and gives one logit."""

    card: ModelCard
    loaded_tokenizer: PairTokenizer | None
    """None while the model is not loaded."""
    is_guest: bool = False
    """Not of the settings: it answers to its names alone."""

    @property
    def tokenizer(self) -> PairTokenizer:
        """Its tokenizer; to be asked for while the model is held (`Residency.hold`)."""
        assert self.loaded_tokenizer is not None
        return self.loaded_tokenizer

    def unloaded(self) -> Reranker:
        """The same model without what takes memory."""
        return replace(self, loaded_tokenizer=None)

    @property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        """Empty: a reranker has no rows of a single text."""
        return (), ()

    def cost(self, request: ScoreRequest) -> Cost:
        """See `Answering`. Logits take next to no memory."""
        around = max(map(len, request.queries), default=0) + len(request.instruction or "") + PAIR_TOKENS
        return Cost(estimated_tokens(self.card, request.documents, around + SPECIAL_TOKENS))

    async def tokenize(self, request: ScoreRequest, options: RunOptions, cache: CachePolicy) -> RequestRows:
        """One row for each document; documents that share a query are tokenized together. Nothing of it is cached."""
        limits = PairLimits(
            request.truncation.side,
            request.max_tokens_per_query,
            request.max_tokens_per_document,
            request.truncation.max_tokens,
            refuse=request.truncation.allowed is False,
        )
        if len(request.queries) == 1:
            groups = [(request.queries[0], request.documents)]
        else:
            pairs = zip(request.queries, request.documents, strict=True)
            groups = [
                (query, [document for _, document in group])
                for query, group in groupby(pairs, key=lambda pair: pair[0])
            ]
        rows = await asyncio.gather(
            *(self.tokenizer.encode(query, documents, request.instruction, limits) for query, documents in groups)
        )
        return RequestRows([row for group in rows for row in group], entries(request.param))

    def finish(self, request: ScoreRequest, results: RowResults) -> ScoreResult:
        """See `Answering`."""
        logits = np.stack(results.vectors)[:, 0].astype(np.float64)
        scores = logits if request.raw_scores else logit_to_relevance(logits)
        return ScoreResult(
            scores, self.card.id, "cross_encoder", results.prompt_tokens, results.truncated, results.timings
        )


@dataclass(frozen=True, slots=True)
class VectorScorer(Answering[ScoreRequest, ScoreResult]):
    """An embedding model that ranks documents by how similar their vectors are to the query's."""

    embedder: Embedder

    @property
    def card(self) -> ModelCard:  # type: ignore[override]
        """The embedding model's."""
        return self.embedder.card

    def cost(self, request: ScoreRequest) -> Cost:
        """See `Answering`."""
        return self.embedder.cost_of([*request.queries, *request.documents], max(map(len, self._prompts(request))))

    def _prompts(self, request: ScoreRequest) -> tuple[str, str]:
        """Before a query and before a document."""
        query = choose_prompt(self.card, PromptChoice(is_query=True, instruction=request.instruction))
        return query, choose_prompt(self.card, PromptChoice(is_query=False))

    async def tokenize(self, request: ScoreRequest, options: RunOptions, cache: CachePolicy) -> RequestRows:
        """A row for each query, then one for each document."""
        model = self.embedder
        query_prompt, document_prompt = self._prompts(request)
        own_side = replace(request.truncation, side=None)
        query_limit = await self._limited(own_side, request.max_tokens_per_query, query_prompt)
        document_limit = await self._limited(request.truncation, request.max_tokens_per_document, document_prompt)
        query_adapter, document_adapter = (
            choose_adapter(self.card, PromptChoice(is_query=is_query)) for is_query in (True, False)
        )
        query_lookup = model.lookup(options, cache, is_query=True)
        document_lookup = model.lookup(options, cache, is_query=False)
        inputs = [
            *await model.tokenize_texts(request.queries, query_prompt, query_limit, query_lookup, query_adapter),
            *await model.tokenize_texts(
                request.documents, document_prompt, document_limit, document_lookup, document_adapter
            ),
        ]
        queries = len(request.queries)
        query = entries(request.query_param) if queries > 1 else lambda index: request.query_param
        document = entries(request.param)
        return RequestRows(inputs, lambda index: query(index) if index < queries else document(index - queries))

    async def _limited(self, whole: Truncation, most: int | None, prompt: str) -> Truncation:
        """The narrower of two limits: of the whole row, and of `most` tokens of the text without what is around it."""
        if most is None:
            return whole
        tokenizer = self.embedder.tokenizer
        [before] = await tokenizer.pool.encode_batch([prompt])
        tokens = most + len(before) + tokenizer.special_tokens
        if whole.max_tokens is not None and whole.max_tokens <= tokens:
            return whole
        return replace(whole, allowed=True, max_tokens=tokens)

    def finish(self, request: ScoreRequest, results: RowResults) -> ScoreResult:
        """See `Answering`."""
        rows, queries = np.stack(results.vectors), len(request.queries)
        raw = similarities(self.card, rows[:queries], rows[queries:])
        return ScoreResult(
            raw if request.raw_scores else similarity_to_relevance(self.card, raw),
            self.card.id,
            self.card.similarity,
            results.prompt_tokens,
            tuple(index - queries for index in results.truncated if index >= queries),
            results.timings,
            results.reported_hit_tokens,
        )


def estimated_tokens(card: ModelCard, inputs: Iterable[str] | Iterable[Sequence[int]], around: int) -> int:
    """Tokens that the inputs will take, at most in practice: one for each character or id and for each of `around`, cut
    at the model's length.
    """
    return sum(min(len(text) + around, card.max_model_len) for text in inputs)


def entries(param: str) -> Callable[[int], str]:
    """What a dialect calls each entry of its list, for error texts."""
    return lambda index: f"{param}[{index}]"


Served = TypeVar("Served", bound=Embedder | Reranker)


class Names(Generic[Served]):
    """Models of one task by every name they have, the default first."""

    def __init__(self, models: Sequence[Served]) -> None:
        self.models = models
        self.own = [model for model in models if not model.is_guest]
        """Those of the settings."""
        self.by_name = {name: model for model in models for name in model.card.names}

    def only(self) -> Served | None:
        """The model, where the settings name one."""
        return self.own[0] if len(self.own) == 1 else None


class ServedModels:
    """Finds the model of a request."""

    def __init__(self, embedders: Sequence[Embedder], rerankers: Sequence[Reranker], *, strict: bool) -> None:
        """The first of each is its default. Only `vecmill verify` loads a reranker without any embedder."""
        self._embedders, self._rerankers = Names(embedders), Names(rerankers)
        self._strict = strict

    def __iter__(self) -> Iterator[Embedder | Reranker]:
        """All models, embedders first."""
        yield from self._embedders.models
        yield from self._rerankers.models

    def renamed(self, before: Aliases, now: Aliases) -> ServedModels:
        """The same models with other MODEL_ALIASES.

        Raises:
            StartupError: an alias is another model's name, or of none that is loaded.
        """
        configured = {alias for alias, _ in before}
        own = {name: card.id for card in self.cards for name in card.names if name not in configured}
        known = with_aliases(own, now)

        def rename(model: Served) -> Served:
            return replace(model, card=replace(model.card, aliases=aliases_of(model.card.id, known)))

        embedders, rerankers = self._embedders.models, self._rerankers.models
        return ServedModels(list(map(rename, embedders)), list(map(rename, rerankers)), strict=self._strict)

    @property
    def cards(self) -> list[ModelCard]:
        """The card of each."""
        return [model.card for model in self]

    def exchanged(self, model: Embedder | Reranker) -> ServedModels:
        """The same models with this one in place of the one of its key, or after the others of its task.

        It answers to the names of the one that it takes the place of; to its own where no other model has them.
        """
        before = next((each for each in self if each.card.key == model.card.key), None)
        if before is not None:
            aliases = before.card.aliases
        else:
            taken = {name for each in self if each.card.task is model.card.task for name in each.card.names}
            aliases = tuple(alias for alias in model.card.aliases if alias not in taken)
        is_guest = before.is_guest if before is not None else True  # the settings' are there from the start
        model = replace(model, card=replace(model.card, aliases=aliases), is_guest=is_guest)
        embedders, rerankers = list(self._embedders.models), list(self._rerankers.models)
        if isinstance(model, Embedder):
            _put(embedders, model)
        else:
            _put(rerankers, model)
        return ServedModels(embedders, rerankers, strict=self._strict)

    def current(self, model: Answering[Request, Result]) -> Answering[Request, Result]:
        """The model as it is loaded now, of one that was found before it was."""
        now = self.by_key(model.card.key)
        if isinstance(model, VectorScorer):
            return cast(Answering[Request, Result], VectorScorer(cast(Embedder, now)))
        return cast(Answering[Request, Result], now)

    def by_key(self, key: str) -> Embedder | Reranker:
        """The model that scheduler and engine call so."""
        return next(model for model in self if model.card.key == key)

    def embedder(self, name: str | None) -> tuple[Embedder, bool | None]:
        """The embedder that answers to `name`, and whether its name says that texts are queries (None: it does not).

        The default for None; the only one for any name, unless STRICT_MODEL; a name may end with a role (`-query`).

        Raises:
            ModelNotFound: there is none.
        """
        if not name:
            return self._embedders.models[0], None
        if name in self._embedders.by_name:
            return self._embedders.by_name[name], None
        stem, is_query = _role(name)
        model = self._embedders.by_name.get(stem)
        if model is None and not self._strict and name not in self._rerankers.by_name:
            model = self._embedders.only()
        if model is None:
            raise self._not_found(name, self._embedders, "embedding models")
        return model, is_query

    def any(self, name: str | None) -> Embedder | Reranker:
        """The reranker of that name, else the embedder that `embedder` finds.

        Raises:
            ModelNotFound: there is none.
        """
        if name and name not in self._embedders.by_name and name in self._rerankers.by_name:
            return self._rerankers.by_name[name]
        return self.embedder(name)[0]

    def scorer(self, name: str | None) -> Reranker | VectorScorer:
        """The reranker called `name`; the embedder (by similarity) if one has that name, or if no reranker is loaded.

        Raises:
            ModelNotFound: there is none.
        """
        if name and name in self._rerankers.by_name:
            return self._rerankers.by_name[name]
        if name and name in self._embedders.by_name:
            return VectorScorer(self._embedders.by_name[name])
        if not self._rerankers.own:
            return VectorScorer(self.embedder(name)[0])
        if name and (self._strict or not self._rerankers.only()):
            raise self._not_found(name, self._rerankers, "rerankers")
        return self._rerankers.own[0]

    def _not_found(self, name: str, names: Names[Served], kind: str) -> ModelNotFound:
        known = ", ".join(names.by_name)
        return ModelNotFound(f"The model `{name[:200]}` does not exist here; {kind} are: {known}.", param="model")


def _put(models: list[Served], model: Served) -> None:
    for index, other in enumerate(models):
        if other.card.key == model.card.key:
            models[index] = model
            return
    models.append(model)


def _role(name: str) -> tuple[str, bool | None]:
    for suffix, is_query in ROLE_SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), is_query
    return name, None


def assemble(
    models: Iterable[tuple[ModelCard, Loadable | None]],
    settings: InferenceSettings,
    threads: WorkerThreads,
) -> ServedModels:
    """The models that requests can name, from the card of each, and the files and the tokenizer of what is loaded.

    Raises:
        StartupError: a tokenizer is not that of its model.
    """
    if settings.token_ids is TokenVocabulary.CL100K:
        cl100k()  # not with the first request that needs it: reading it holds the interpreter
    assembled = [assemble_one(card, files, settings, threads) for card, files in models]
    embedders = [model for model in assembled if isinstance(model, Embedder)]
    rerankers = [model for model in assembled if isinstance(model, Reranker)]
    return ServedModels(embedders, rerankers, strict=settings.strict_model)


Loadable = tuple[Checkpoint, ReadTokenizer]


def assemble_one(
    card: ModelCard, files: Loadable | None, settings: InferenceSettings, threads: WorkerThreads
) -> Embedder | Reranker:
    """One model; without its files, as one that is not loaded.

    Raises:
        StartupError: the tokenizer is not that of the model.
    """
    if card.task is Task.RERANK:
        return Reranker(card, _pair_tokenizer(card, *files, settings, threads) if files is not None else None)
    tokenizer = None
    if files is not None:
        checkpoint, read = files
        pool = TokenizerPool(read, card.vocab_size, card.max_model_len, threads)
        tokenizer = TextTokenizer(pool, checkpoint.text_format, card.max_model_len, card.vocab_size)
    return Embedder(card, tokenizer, model_fingerprint(card), settings.token_ids, threads)


def _pair_tokenizer(
    card: ModelCard,
    checkpoint: Checkpoint,
    read: ReadTokenizer,
    settings: InferenceSettings,
    threads: WorkerThreads,
) -> PairTokenizer:
    form = rerank_form(checkpoint)
    make = partial(TokenizerPool, read, card.vocab_size, card.max_model_len, threads)
    pool = make(control_tokens=settings.allow_control_tokens, prompt=form.prompt.fixed_text if form.prompt else "")
    default = None if card.default_prompt_name is None else card.prompts.get(card.default_prompt_name)
    padding = padding_token(checkpoint)
    if form.prompt is None:
        return CrossEncoderTokenizer(pool, card.max_model_len, default or "", padding)
    control = pool if settings.allow_control_tokens else make()
    try:
        return InstructTokenizer(
            pool,
            control,
            card.max_model_len,
            form.prompt,
            default,
            padding,
            # What is pooled is of all tokens, the prefix's too.
            shares_prefix=not (checkpoint.network.both_ways or checkpoint.scores_vectors),
        )
    except UnfitTemplateError as error:
        raise StartupError(f"{checkpoint.named}: its chat template {error}.") from None
