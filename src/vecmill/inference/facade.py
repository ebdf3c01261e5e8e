"""embed() and rerank(): the one way from a request to a result, whatever the dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import cast

import numpy as np

from vecmill.config import InferenceSettings
from vecmill.core.errors import EmptyInput, ModelLoading, ShuttingDown, TooManyInputs
from vecmill.core.health import Health, Phase
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import (
    EmbedRequest,
    EmbedResult,
    Lane,
    ModelCard,
    PromptChoice,
    RerankRequest,
    RerankResult,
    Scores,
)
from vecmill.hardware.memory import MemoryGuard
from vecmill.inference.admission import Admission, Permit
from vecmill.inference.finish import (
    check_dimensions,
    cosine_to_relevance,
    cosines,
    finish,
    logit_to_relevance,
)
from vecmill.inference.prompts import choose_prompt
from vecmill.inference.running import Asked, Ran, run_rows, within
from vecmill.inference.served import ServedEmbedder, ServedModels, ServedReranker
from vecmill.inference.tokenization import Tokenized
from vecmill.scheduler.policy import Budget
from vecmill.scheduler.scheduler import Scheduler, SchedulerStats
from vecmill.telemetry.telemetry import Telemetry

SPECIAL_TOKENS = 2  # of a text, for the estimate
PAIR_TOKENS = 128  # around a query and a document, for the estimate


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
    ) -> None:
        self._settings = settings
        self._request_timeout = request_timeout
        self._health = health
        self._telemetry = telemetry
        self._threads = threads
        self._models: ServedModels | None = None
        self._scheduler: Scheduler | None = None
        self.admission = Admission(
            settings.max_concurrent_requests,
            settings.max_queued_tokens,
            lambda: telemetry.rolling.rates()[1],
            memory.check,
        )

    def attach(self, models: ServedModels, scheduler: Scheduler) -> None:
        """Begin to serve."""
        self._models = models
        self._scheduler = scheduler

    @property
    def cards(self) -> list[ModelCard]:
        """The models served, embedders first and the default of each kind before the others; empty while loading."""
        return self._models.cards if self._models else []

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
        model, is_query = self._models_or_raise().embedder(request.model)
        card = model.card
        check_dimensions(card, request.dimensions)
        self._check_count(len(request.inputs), request.param)
        # A field of the request wins over the role that its model's name ends with.
        choice = PromptChoice(is_query) if request.prompt == PromptChoice() else request.prompt
        prompt = choose_prompt(card, choice)
        tokens = estimate(card, request.inputs, len(prompt))
        async with within(request.caller, self._request_timeout) as deadline:
            with self.admission.admit(tokens, result_bytes(card, len(request.inputs))) as permit:
                asked = Asked(
                    request.caller, bool(choice.is_query), self._truncate(request.truncate), started, deadline
                )
                if isinstance(request.inputs[0], str):
                    tokenized = await model.tokenizer.encode(cast(Sequence[str], request.inputs), prompt)
                else:
                    ids = cast(Sequence[Sequence[int]], request.inputs)
                    check = partial(model.tokenizer.check, ids, request.param)
                    tokenized = await self._threads.run_if_large(check, size=tokens)
                ran = await self._run(model, tokenized, permit, asked, entries(request.param))
                finished = partial(
                    finish, ran.rows, request.dimensions, request.normalize, layer_norm=card.layer_norm_before_slice
                )
                embeddings = await self._threads.run_if_large(finished, size=ran.rows[0].nbytes * len(ran.rows))
        self._report("embed", model, len(request.inputs), ran, started)
        return EmbedResult(embeddings, card.id, ran.prompt_tokens, ran.truncated, ran.timings)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Score documents against a query: by a reranker, or by the cosine of an embedding model.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, DeadlineExceeded, Unavailable: see `vecmill.core.errors`.
        """
        started = perf_counter()
        model = self._models_or_raise().reranker(request.model)
        self._check_count(len(request.documents), request.param)
        async with within(request.caller, self._request_timeout) as deadline:
            asked = Asked(request.caller, True, self._truncate(request.truncate), started, deadline)
            if isinstance(model, ServedReranker):
                scores, ran, method = *await self._rerank_pairs(model, request, asked), "cross_encoder"
            else:
                scores, ran, method = *await self._rerank_by_cosine(model, request, asked), "cosine"
        self._report("rerank", model, len(request.documents), ran, started)
        return RerankResult(scores, model.card.id, method, ran.prompt_tokens, ran.truncated, ran.timings)

    async def _rerank_pairs(self, model: ServedReranker, request: RerankRequest, asked: Asked) -> tuple[Scores, Ran]:
        around = len(request.query) + len(request.instruction or "") + PAIR_TOKENS
        with self.admission.admit(estimate(model.card, request.documents, around)) as permit:
            tokenized = await model.tokenizer.encode(request.query, request.documents, request.instruction)
            ran = await self._run(model, tokenized, permit, asked, entries(request.param))
        logits = np.stack(ran.rows)[:, 0].astype(np.float64)
        return logits if request.raw_scores else logit_to_relevance(logits), ran

    async def _rerank_by_cosine(
        self, model: ServedEmbedder, request: RerankRequest, asked: Asked
    ) -> tuple[Scores, Ran]:
        query_prompt = choose_prompt(model.card, PromptChoice(is_query=True, instruction=request.instruction))
        document_prompt = choose_prompt(model.card, PromptChoice(is_query=False))
        texts = [request.query, *request.documents]
        tokens = estimate(model.card, texts, max(len(query_prompt), len(document_prompt)))
        with self.admission.admit(tokens, result_bytes(model.card, len(texts))) as permit:
            tokenized = [
                *await model.tokenizer.encode([request.query], query_prompt),
                *await model.tokenizer.encode(request.documents, document_prompt),
            ]
            names = ["query", *map(entries(request.param), range(len(request.documents)))]
            ran = await self._run(model, tokenized, permit, asked, names.__getitem__)
            similarities = cosines(ran.rows[0], np.stack(ran.rows[1:]))
        scores = similarities if request.raw_scores else cosine_to_relevance(similarities)
        return scores, replace(ran, truncated=tuple(index - 1 for index in ran.truncated if index))

    async def _run(
        self,
        model: ServedEmbedder | ServedReranker,
        tokenized: Sequence[Tokenized],
        permit: Permit,
        asked: Asked,
        name: Callable[[int], str],
    ) -> Ran:
        tokens = sum(len(one.row) for one in tokenized)
        permit.settle(tokens)
        self._models_or_raise()  # the server may have begun to drain meanwhile
        assert self._scheduler is not None  # attached together with the models
        return await run_rows(self._scheduler, model, tokenized, tokens, asked, name)

    def _truncate(self, asked: bool | None) -> bool:
        return self._settings.auto_truncate if asked is None else asked

    def _models_or_raise(self) -> ServedModels:
        phase, percent, message = self._health.snapshot()
        if phase is Phase.DRAINING:
            raise ShuttingDown
        if self._models is None:
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
            total=perf_counter() - started,
            timings=ran.timings,
            waited=ran.waited,
        )


def estimate(card: ModelCard, inputs: Iterable[str] | Iterable[Sequence[int]], around: int) -> int:
    """Tokens that the inputs will take, at most in practice: one a character or id, cut at the model's length.

    `around` is what goes around each of them, in characters.
    """
    return sum(min(len(one) + around + SPECIAL_TOKENS, card.max_model_len) for one in inputs)


def entries(param: str) -> Callable[[int], str]:
    """What a dialect calls each entry of its list, for error texts."""
    return lambda index: f"{param}[{index}]"


def result_bytes(card: ModelCard, inputs: int) -> int:
    """Memory that a request's vectors take, at the most: as they come, finished, and as JSON."""
    return inputs * (card.dimensions or 1) * (4 + 4 + 16)
