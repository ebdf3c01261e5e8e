"""embed() and score(): the one way from a request to a result, whatever the dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from time import perf_counter

from vecmill.cache.embedding_cache import EmbeddingCache
from vecmill.config import InferenceSettings
from vecmill.core.errors import EmptyInput, ModelLoading, TooManyInputs, lack_of_memory_refused
from vecmill.core.health import Health
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import (
    NO_LIMITS,
    Caller,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    KeyLimits,
    Lane,
    ModelCard,
    PromptChoice,
    RequestRecord,
    ScoreRequest,
    ScoreResult,
    TokenizeRequest,
    TokenizeResult,
    Truncation,
)
from vecmill.hardware.memory import MemoryGuard
from vecmill.inference.admission import Admission
from vecmill.inference.cache_lookup import CachePolicy
from vecmill.inference.models import Aliases, Answering, Embedder, Request, Reranker, Result, ServedModels
from vecmill.inference.residency import Residency
from vecmill.inference.schedule import RowResults, RunOptions, expected_lane, run_rows, within
from vecmill.inference.text_tokenizer import Tokenized, asks_for_query, choose_prompt
from vecmill.inference.token_ids import check_shown_size, detokenized, pieces_of
from vecmill.inference.vectors import check_dimensions
from vecmill.scheduler.policy import Budget
from vecmill.scheduler.scheduler import Scheduler, SchedulerStats
from vecmill.telemetry.telemetry import Recording, Telemetry


class Inference:
    """Requests in, results out. Belongs to the event loop's thread."""

    def __init__(
        self,
        settings: InferenceSettings,
        request_timeout: float,
        health: Health,
        telemetry: Telemetry,
        threads: WorkerThreads,
        memory: MemoryGuard,
        *,
        cache_queries: bool = True,
        cache_across_keys: bool = True,
        limits_of: Callable[[str | None], KeyLimits] = lambda owner: NO_LIMITS,
        several_keys: Callable[[], bool] = lambda: False,
        key_name: Callable[[str | None], str | None] = lambda owner: owner,
    ) -> None:
        """`limits_of` a key's owner: what that key may have in progress. `several_keys`: whether there are others.
        `key_name`: the name of an owner's key.
        """
        self._settings = settings
        self._cache = CachePolicy(
            threads, cache_queries=cache_queries, cache_across_keys=cache_across_keys, several_keys=several_keys
        )
        self._request_timeout = request_timeout
        self._health = health
        self._telemetry = telemetry
        self._threads = threads
        self._key_name = key_name
        self._models: ServedModels | None = None
        self._residency: Residency | None = None
        self._scheduler: Scheduler | None = None
        self.admission = Admission(
            settings.max_concurrent_requests,
            settings.max_queued_tokens,
            wait_seconds=settings.queue_timeout,
            tokens_run=lambda: self.stats.tokens,
            expected_rate=lambda: self._expected_rate,
            check_memory=memory.check,
            limits_of=limits_of,
        )
        self._expected_rate = 0.0

    def attach(
        self,
        models: ServedModels,
        scheduler: Scheduler,
        residency: Residency,
        cache: EmbeddingCache | None = None,
        *,
        expected_rate: float = 0.0,
    ) -> None:
        """Begin to serve. `expected_rate`: tokens a second that the device did at warm-up."""
        self._expected_rate = expected_rate
        self._models = models
        self._residency = residency
        self._scheduler = scheduler
        self._cache.cache = cache

    @property
    def cards(self) -> list[ModelCard]:
        """The models served, embedders first and the default of each kind before the others; empty while loading."""
        return self._models.cards if self._models else []

    def card(self, name: str | None) -> ModelCard:
        """The model that answers to a name.

        Raises:
            ModelNotFound: there is none. Unavailable: none is loaded.
        """
        return self._models_or_raise().any(name).card

    def rename(self, before: Aliases, now: Aliases) -> None:
        """Exchange MODEL_ALIASES. What is in progress keeps its model.

        Raises:
            StartupError: an alias is another model's name, or of none that is loaded; nothing has changed.
        """
        if before != now:
            self._models = self._models_or_raise().renamed(before, now)
            residents = self._residency.residents if self._residency is not None else {}
            for card in self._models.cards:
                residents[card.key].card = card

    def exchange(self, model: Embedder | Reranker, budget: Budget, expected_rate: float) -> ModelCard:
        """Put a loaded model in place of the one of its key, or beside the others; its card as requests know it now.

        `budget`: of its forward passes; `expected_rate`: tokens a second that the device does from now on.
        """
        self._models = self._models_or_raise().exchanged(model)
        self._expected_rate = expected_rate
        if self._scheduler is not None:
            self._scheduler.set_budget(model.card.key, budget)
        return self._models.by_key(model.card.key).card

    def change_budget(self, key: str, budget: Budget, expected_rate: float) -> None:
        """What a loaded model's forward passes hold from now on, and the tokens a second that the device does."""
        self._expected_rate = expected_rate
        if self._scheduler is not None:
            self._scheduler.change_budget(key, budget)

    def forget_tokenizer(self, key: str) -> None:
        """Let go of what a model needs to be asked, but for its card."""
        models = self._models_or_raise()
        self._models = models.exchanged(models.by_key(key).unloaded())

    @property
    def residency(self) -> Residency | None:
        """Which models are loaded; None while the server starts."""
        return self._residency

    def has_rows(self, key: str) -> bool:
        """Whether rows of a model wait for a batch or run."""
        return self._scheduler is not None and self._scheduler.has_rows(key)

    async def keep_loaded(self, name: str | None, caller: Caller) -> ModelCard:
        """Have the model that answers to a name loaded, and the caller's `keep_alive` hold from now on.

        A model that is not in memory is not loaded only to be unloaded.

        Raises:
            ModelNotFound, DeadlineExceeded, Unavailable: see `vecmill.core.errors`.
        """
        model = self._models_or_raise().any(name)
        assert self._residency is not None  # attached together with the models
        if caller.keep_alive == 0 and not self._residency.residents[model.card.key].is_here:
            return model.card
        async with within(caller, self._request_timeout), self._hold(model.card.key, caller):
            return model.card

    def _hold(self, key: str, caller: Caller | None = None) -> AbstractAsyncContextManager[None]:
        assert self._residency is not None  # attached together with the models
        return self._residency.hold(key, caller)

    @property
    def waiting(self) -> Mapping[Lane, int]:
        """Texts that wait for a batch, by lane."""
        return self._scheduler.waiting if self._scheduler else dict.fromkeys(Lane, 0)

    @property
    def queued(self) -> Mapping[tuple[str, Lane], tuple[int, int]]:
        """Texts and tokens that wait for a batch, by the scheduler's key of each model and by lane."""
        return self._scheduler.queued if self._scheduler else {}

    @property
    def rest_of_pass(self) -> float:
        """Seconds until the forward pass on the device ends, as expected; 0.0 where none runs."""
        return self._scheduler.rest_of_pass if self._scheduler else 0.0

    @property
    def stats(self) -> SchedulerStats:
        """What the scheduler has counted since the start."""
        return self._scheduler.stats if self._scheduler else SchedulerStats()

    @property
    def budgets(self) -> Mapping[str, Budget]:
        """What a forward pass may hold now, by the scheduler's key of each model; empty while loading."""
        return self._scheduler.budgets if self._scheduler else {}

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Turn texts into vectors.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, DeadlineExceeded, Unavailable: see `vecmill.core.errors`.
        """
        with self._recording("embed", request.caller, len(request.inputs)) as record, lack_of_memory_refused():
            model, named_role = self._models_or_raise().embedder(request.model)
            record.model, record.dimensions = model.card.id, request.dimensions or model.card.dimensions
            check_dimensions(model.card, request.dimensions)
            self._check_count(len(request.inputs), request.param)
            if named_role is not None and request.prompt == PromptChoice():
                request = replace(request, prompt=PromptChoice(named_role))  # a field of the request would win
            return await self._answer(model, request, record, interactive_hint=asks_for_query(request.prompt))

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Score documents against queries: by a reranker, or by the similarity of an embedding model's vectors.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, DeadlineExceeded, Unavailable: see `vecmill.core.errors`.
        """
        with self._recording("rerank", request.caller, len(request.documents)) as record, lack_of_memory_refused():
            model = self._models_or_raise().scorer(request.model)
            record.model = model.card.id
            self._check_count(len(request.documents), request.param)
            return await self._answer(model, request, record, interactive_hint=True)

    def _recording(self, operation: str, caller: Caller, texts: int) -> Recording:
        record = RequestRecord(
            operation,
            caller.dialect,
            self._key_name(caller.owner),
            caller.address,
            caller.job_id,
            caller.request_id,
            texts,
            owner=caller.owner,
        )
        if caller.records is not None:
            caller.records.append(record)
        return self._telemetry.recording(record)

    async def _answer(
        self, model: Answering[Request, Result], request: Request, record: RequestRecord, *, interactive_hint: bool
    ) -> Result:
        """Load the model, admit the request, tokenize it, run its rows, finish them; `record` is told of each stage."""
        caller = request.caller
        async with within(caller, self._request_timeout) as deadline, self._hold(model.card.key, caller):
            model = self._models_or_raise().current(model)
            cost = model.cost(request)
            lane = expected_lane(
                caller, interactive_hint=interactive_hint, texts=record.texts, estimated_tokens=cost.tokens
            )
            record.lane = lane
            async with self.admission.admit(caller, lane, cost.tokens, cost.result_bytes) as permit:
                admitted = perf_counter()
                record.admission = record.queue = admitted - record.arrived
                options = RunOptions(
                    caller=caller,
                    interactive_hint=interactive_hint,
                    truncate=self._truncates(request.truncation),
                    arrived=record.arrived,
                    admitted=admitted,
                    deadline=deadline,
                    partition=self._cache.partition(caller),
                )
                rows = await model.tokenize(request, options, self._cache)
                record.tokenize = perf_counter() - admitted
                permit.settle(sum(row.tokens for row in rows.inputs if isinstance(row, Tokenized)))
                record.tokens = sum(row.tokens for row in rows.inputs)
                assert self._scheduler is not None  # attached together with the models
                results = await run_rows(self._scheduler, model.card, rows, options, self._cache.keep(model.card))
                _fill(record, results)
                if self._cache.hides_hits:
                    vectors, hits = await self._cache.disguise(results.vectors, rows.inputs, model.card, caller.owner)
                    results = replace(results, vectors=vectors, reported_hits=hits)
                finish = partial(model.finish, request, results)
                return await self._threads.run_if_large(finish, size=results.nbytes)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResult:
        """Show the tokens of texts.

        Raises:
            InvalidInput, ModelNotFound, Unavailable: see `vecmill.core.errors`.
        """
        model = self._models_or_raise().any(request.model)
        self._check_count(len(request.texts), request.param)
        prompt = choose_prompt(model.card, request.prompt)
        size = check_shown_size(request, prompt)
        async with self._hold(model.card.key):
            model = self._models_or_raise().by_key(model.card.key)
            show = partial(pieces_of, model.tokenizer.pool, model.around, request, prompt)
            return TokenizeResult(await self._threads.run(show, size=size), model.card)

    async def detokenize(self, request: DetokenizeRequest) -> list[str]:
        """Turn token ids of the model's vocabulary into texts.

        Raises:
            InvalidInput, ModelNotFound, Unavailable: see `vecmill.core.errors`.
        """
        model = self._models_or_raise().any(request.model)
        self._check_count(len(request.inputs), request.param)
        size = check_shown_size(request)
        async with self._hold(model.card.key):
            model = self._models_or_raise().by_key(model.card.key)
            return await self._threads.run(partial(detokenized, model.tokenizer.pool, model.card, request), size=size)

    def _truncates(self, truncation: Truncation) -> bool:
        return self._settings.auto_truncate if truncation.allowed is None else truncation.allowed

    def _models_or_raise(self) -> ServedModels:
        if self._models is None:
            _, percent, message = self._health.snapshot()
            raise ModelLoading(
                f"503: the server is temporarily unavailable, the model is loading ({percent:.0f} %, {message}); "
                f"try again."
            )
        return self._models

    def _check_count(self, count: int, param: str) -> None:
        if count == 0:
            raise EmptyInput(f"`{param}` cannot be empty; send at least one.", param=param)
        limit = self._settings.max_client_batch_size
        if count > limit:
            raise TooManyInputs(
                f"`{param}` has {count} entries, {limit} are possible (MAX_CLIENT_BATCH_SIZE); split the request.",
                param=param,
            )


def _fill(record: RequestRecord, results: RowResults) -> None:
    record.lane, record.waited = results.lane, results.waited
    record.truncated, record.cached, record.cached_tokens = (
        len(results.truncated),
        len(results.cached),
        results.cached_tokens,
    )
    timings = results.timings
    record.tokenize, record.queue, record.forward = timings.tokenize, timings.queue, timings.forward
