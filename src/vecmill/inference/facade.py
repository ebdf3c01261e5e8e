"""embed() and score(): the one way from a request to a result, whatever the dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import cast

from vecmill.cache.embedding_cache import EmbeddingCache, fingerprint_of
from vecmill.config import InferenceSettings
from vecmill.core.errors import EmptyInput, ModelLoading, TooManyInputs
from vecmill.core.health import Health
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import (
    NO_LIMITS,
    CacheControl,
    Caller,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    KeyLimits,
    Lane,
    ModelCard,
    PromptChoice,
    ScoreRequest,
    ScoreResult,
    TokenizeRequest,
    TokenizeResult,
    Truncation,
)
from vecmill.hardware.memory import MemoryGuard
from vecmill.inference.admission import Admission, Permit
from vecmill.inference.cache_lookup import Recall, Recalled, SentBefore, TextMemory
from vecmill.inference.cost import entries, estimate, result_bytes
from vecmill.inference.finish import check_dimensions, finish
from vecmill.inference.lane import expected_lane
from vecmill.inference.models import Aliases, ServedEmbedder, ServedModels, ServedReranker
from vecmill.inference.pieces import check_size, pieces, texts_of
from vecmill.inference.prompts import asks_for_query, choose_prompt
from vecmill.inference.schedule import Asked, Ran, run_rows, within
from vecmill.inference.scoring import cost, names_apart, score_result, tokenize_apart, tokenize_pairs, tokenize_texts
from vecmill.inference.text_tokenizer import Tokenized
from vecmill.inference.token_ids import texts_of_ids
from vecmill.scheduler.policy import Budget
from vecmill.scheduler.scheduler import Scheduler, SchedulerStats
from vecmill.telemetry.telemetry import Telemetry


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
    ) -> None:
        """`limits_of` a key's owner: what that key may have in progress. `several_keys`: whether there are others."""
        self._settings = settings
        self._cache_queries = cache_queries
        self._cache: EmbeddingCache | None = None
        self._texts = TextMemory()
        self._sent = SentBefore()
        self._across_keys = cache_across_keys
        self._several_keys = several_keys
        self._request_timeout = request_timeout
        self._health = health
        self._telemetry = telemetry
        self._threads = threads
        self._models: ServedModels | None = None
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
        cache: EmbeddingCache | None = None,
        *,
        expected_rate: float = 0.0,
    ) -> None:
        """Begin to serve. `expected_rate`: tokens a second that the device did at warm-up."""
        self._expected_rate = expected_rate
        self._models = models
        self._scheduler = scheduler
        self._cache = cache

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

    @property
    def waiting(self) -> Mapping[Lane, int]:
        """Texts that wait for a batch, by lane."""
        return self._scheduler.waiting if self._scheduler else dict.fromkeys(Lane, 0)

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
        started = perf_counter()
        model, named_role = self._models_or_raise().embedder(request.model)
        card = model.card
        check_dimensions(card, request.dimensions)
        self._check_count(len(request.inputs), request.param)
        # A field of the request wins over the role that its model's name ends with.
        choice = PromptChoice(named_role) if request.prompt == PromptChoice() else request.prompt
        prompt = choose_prompt(card, choice)
        tokens = estimate(card, request.inputs, len(prompt))
        is_query = asks_for_query(choice)
        lane = expected_lane(request.caller, is_query=is_query, texts=len(request.inputs), estimated_tokens=tokens)
        async with within(request.caller, self._request_timeout) as deadline:
            size = result_bytes(card, len(request.inputs))
            async with self.admission.admit(request.caller, lane, tokens, size) as permit:
                asked = Asked(
                    request.caller, is_query, self._truncate(request.truncation), started, perf_counter(), deadline
                )
                recall = self._recall(model, asked, is_query=is_query)
                inputs = await self._tokenize(model, request, prompt, recall)
                ran = await self._run(model, inputs, permit, asked, entries(request.param))
                finished = partial(
                    finish, ran.rows, request.dimensions, request.normalize, layer_norm=card.layer_norm_before_slice
                )
                embeddings = await self._threads.run_if_large(finished, size=ran.rows[0].nbytes * len(ran.rows))
        self._report("embed", model, len(request.inputs), ran, started)
        return EmbedResult(embeddings, card.id, ran.prompt_tokens, ran.truncated, ran.timings, ran.tokens, ran.told)

    def _recall(self, model: ServedEmbedder, asked: Asked, *, is_query: bool) -> Recall | None:
        """The way to kept vectors; None where the request, or a setting, rules them out."""
        control = asked.caller.cache_control
        private = is_query and not self._cache_queries
        if self._cache is None or private or control is CacheControl.NO_STORE:
            return None
        return Recall(
            self._cache,
            self._texts,
            fingerprint_of(model.fingerprint, apart) if (apart := self._apart(asked.caller)) else model.fingerprint,
            model.card.dimensions or 0,
            look_up=control is not CacheControl.NO_CACHE,
            truncate=asked.truncate,
            as_read=self._hides_hits,
        )

    async def _tokenize(
        self, model: ServedEmbedder, request: EmbedRequest, prompt: str, recall: Recall | None
    ) -> Sequence[Tokenized | Recalled]:
        texts = request.inputs
        if not isinstance(texts[0], str):
            ids = cast(Sequence[Sequence[int]], texts)
            whose = request.token_vocabulary or self._settings.token_ids
            side = model.tokenizer.side(request.truncation)
            truncation = replace(request.truncation, allowed=self._truncate(request.truncation), side=side)
            read = partial(texts_of_ids, whose, ids, model.tokenizer.pool, request.param, truncation)
            size = sum(map(len, ids))
            found = await self._threads.run_if_large(read, size=size)
            if found is None:
                check = partial(model.tokenizer.check, ids, request.param, request.truncation)
                rows = await self._threads.run_if_large(check, size=size)
                return await self._threads.run(partial(recall.of_rows, rows), size=size) if recall else rows
            inputs = await tokenize_texts(model, found.texts, prompt, request.truncation, recall)
            return [one.marked_as_cut() if index in found.cut else one for index, one in enumerate(inputs)]
        return await tokenize_texts(model, cast(Sequence[str], texts), prompt, request.truncation, recall)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Score documents against queries: by a reranker, or by the similarity of an embedding model's vectors.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, DeadlineExceeded, Unavailable: see `vecmill.core.errors`.
        """
        started = perf_counter()
        model = self._models_or_raise().reranker(request.model)
        self._check_count(len(request.documents), request.param)
        async with within(request.caller, self._request_timeout) as deadline:
            tokens, size = cost(model, request)
            lane = expected_lane(request.caller, is_query=True, texts=len(request.documents), estimated_tokens=tokens)
            async with self.admission.admit(request.caller, lane, tokens, size) as permit:
                truncate = self._truncate(request.truncation)
                asked = Asked(request.caller, True, truncate, started, perf_counter(), deadline)
                if isinstance(model, ServedReranker):
                    inputs: Sequence[Tokenized | Recalled] = await tokenize_pairs(model.tokenizer, request)
                    names = entries(request.param)
                else:
                    query = self._recall(model, asked, is_query=True)
                    document = self._recall(model, asked, is_query=False)
                    inputs, names = await tokenize_apart(model, request, query, document), names_apart(request)
                ran = await self._run(model, inputs, permit, asked, names)
                read = partial(score_result, model, request, ran)
                result = await self._threads.run_if_large(read, size=ran.rows[0].nbytes * len(ran.rows))
        self._report("rerank", model, len(request.documents), ran, started)
        return result

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResult:
        """Show the tokens of texts.

        Raises:
            InvalidInput, ModelNotFound, Unavailable: see `vecmill.core.errors`.
        """
        model = self._models_or_raise().any(request.model)
        self._check_count(len(request.texts), request.param)
        prompt = choose_prompt(model.card, request.prompt)
        size = check_size(request, prompt)
        show = partial(pieces, model, request, prompt)
        return TokenizeResult(await self._threads.run(show, size=size), model.card)

    async def detokenize(self, request: DetokenizeRequest) -> list[str]:
        """Turn token ids of the model's vocabulary into texts.

        Raises:
            InvalidInput, ModelNotFound, Unavailable: see `vecmill.core.errors`.
        """
        model = self._models_or_raise().any(request.model)
        self._check_count(len(request.inputs), request.param)
        return await self._threads.run(partial(texts_of, model, request), size=check_size(request))

    async def _run(
        self,
        model: ServedEmbedder | ServedReranker,
        inputs: Sequence[Tokenized | Recalled],
        permit: Permit,
        asked: Asked,
        name: Callable[[int], str],
    ) -> Ran:
        permit.settle(sum(one.tokens for one in inputs if isinstance(one, Tokenized)))
        assert self._scheduler is not None  # attached together with the models
        keep = None
        if self._cache is not None and model.card.supported_dimensions:
            keep = partial(self._cache.keep, smallest=min(model.card.supported_dimensions))
        asked = replace(asked, apart=self._apart(asked.caller))
        ran = await run_rows(self._scheduler, model, inputs, asked, name, keep)
        return await self._hidden(ran, inputs, model, asked.caller) if self._hides_hits else ran

    @property
    def _hides_hits(self) -> bool:
        """Whether no answer may tell that its texts were another key's."""
        return self._cache is not None and self._across_keys and self._several_keys()

    async def _hidden(
        self,
        ran: Ran,
        inputs: Sequence[Tokenized | Recalled],
        model: ServedEmbedder | ServedReranker,
        caller: Caller,
    ) -> Ran:
        """What was computed looks like what was kept, and a key is told of the hits of its own texts alone."""
        new = [index for index, one in enumerate(inputs) if isinstance(one, Tokenized) and one.key is not None]
        rows = list(ran.rows)
        if new and self._cache is not None:
            smallest = min(model.card.supported_dimensions)
            read = partial(self._cache.as_read, [rows[index] for index in new], smallest)
            for index, row in zip(
                new, await self._threads.run_if_large(read, size=rows[0].nbytes * len(new)), strict=True
            ):
                rows[index] = row
        return replace(ran, rows=rows, told=self._sent.told(caller.owner or "", inputs))

    def _apart(self, caller: Caller) -> str:
        """Whose texts a request's may be taken for equal with; empty: everyone's."""
        return "" if self._across_keys else caller.owner or ""

    def _truncate(self, truncation: Truncation) -> bool:
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

    def _report(
        self, operation: str, model: ServedEmbedder | ServedReranker, texts: int, ran: Ran, started: float
    ) -> None:
        self._telemetry.answered(
            operation,
            model.card.id,
            ran.lane,
            texts=texts,
            tokens=ran.prompt_tokens,
            truncated=len(ran.truncated),
            cached=len(ran.cached),
            cached_tokens=ran.cached_tokens,
            total=perf_counter() - started,
            timings=ran.timings,
            waited=ran.waited,
        )
