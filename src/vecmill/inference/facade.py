"""embed() and rerank(): the one way from a request to a result, whatever the dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import cast

import numpy as np

from vecmill.config import InferenceSettings
from vecmill.core.errors import EmptyInput, InputTooLong, InvalidInput, ModelLoading, ShuttingDown, TooManyInputs
from vecmill.core.health import Health, Phase
from vecmill.core.types import (
    EmbedRequest,
    EmbedResult,
    Matrix,
    ModelCard,
    PromptChoice,
    RerankRequest,
    RerankResult,
    Scores,
    Timings,
)
from vecmill.inference.admission import Admission, Permit
from vecmill.inference.finish import (
    check_dimensions,
    cosine_to_relevance,
    cosines,
    finish,
    logit_to_relevance,
)
from vecmill.inference.gather import all_or_first_error
from vecmill.inference.prompts import choose_prompt
from vecmill.inference.served import ServedEmbedder, ServedModels, ServedReranker
from vecmill.inference.tokenization import Tokenized
from vecmill.scheduler.scheduler import Scheduler
from vecmill.telemetry.telemetry import Telemetry

SPECIAL_TOKENS = 2  # of a text, for the estimate
PAIR_TOKENS = 128  # around a query and a document, for the estimate


@dataclass(frozen=True, slots=True)
class Ran:
    """What the model gave for each row, and what it cost."""

    rows: Matrix
    """Full-width vectors, or logits of width 1."""
    prompt_tokens: int
    truncated: tuple[int, ...]
    timings: Timings
    waited: bool


class Inference:
    """Requests in, results out. Belongs to the event loop's thread."""

    def __init__(self, settings: InferenceSettings, health: Health, telemetry: Telemetry) -> None:
        self._settings = settings
        self._health = health
        self._telemetry = telemetry
        self._models: ServedModels | None = None
        self._scheduler: Scheduler | None = None
        self.admission = Admission(
            settings.max_concurrent_requests, settings.max_queued_tokens, lambda: telemetry.rolling.rates()[1]
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
    def waiting(self) -> int:
        """Texts that wait for a batch."""
        return self._scheduler.waiting if self._scheduler else 0

    @property
    def abandoned(self) -> int:
        """Texts freed before they were run, since the start."""
        return self._scheduler.stats.abandoned if self._scheduler else 0

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Turn texts into vectors.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, Unavailable: see `vecmill.core.errors`.
        """
        started = perf_counter()
        model, is_query = self._models_or_raise().embedder(request.model)
        card = model.card
        check_dimensions(card, request.dimensions)
        self._check_count(len(request.inputs), request.param)
        # A field of the request wins over the role that its model's name ends with.
        choice = PromptChoice(is_query) if request.prompt == PromptChoice() else request.prompt
        prompt = choose_prompt(card, choice)
        with self.admission.admit(estimate(card, request.inputs, len(prompt))) as permit:
            if isinstance(request.inputs[0], str):
                tokenized = await model.tokenizer.encode(cast(Sequence[str], request.inputs), prompt)
            else:
                tokenized = model.tokenizer.check(cast(Sequence[Sequence[int]], request.inputs), request.param)
            ran = await self._run(model, tokenized, permit, started, request.truncate, entries(request.param))
            embeddings = finish(
                ran.rows, request.dimensions, request.normalize, layer_norm=card.layer_norm_before_slice
            )
        self._report("embed", model, len(request.inputs), ran, started)
        return EmbedResult(embeddings, card.id, ran.prompt_tokens, ran.truncated, ran.timings)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Score documents against a query: by a reranker, or by the cosine of an embedding model.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, Unavailable: see `vecmill.core.errors`.
        """
        started = perf_counter()
        model = self._models_or_raise().reranker(request.model)
        self._check_count(len(request.documents), request.param)
        if isinstance(model, ServedReranker):
            return await self._rerank_pairs(model, request, started)
        return await self._rerank_by_cosine(model, request, started)

    async def _rerank_pairs(self, model: ServedReranker, request: RerankRequest, started: float) -> RerankResult:
        around = len(request.query) + len(request.instruction or "") + PAIR_TOKENS
        with self.admission.admit(estimate(model.card, request.documents, around)) as permit:
            tokenized = await model.tokenizer.encode(request.query, request.documents, request.instruction)
            ran = await self._run(model, tokenized, permit, started, request.truncate, entries(request.param))
        logits = ran.rows[:, 0].astype(np.float64)
        scores = logits if request.raw_scores else logit_to_relevance(logits)
        return self._ranked(model, request, scores, "cross_encoder", ran, started)

    async def _rerank_by_cosine(self, model: ServedEmbedder, request: RerankRequest, started: float) -> RerankResult:
        query_prompt = choose_prompt(model.card, PromptChoice(is_query=True, instruction=request.instruction))
        document_prompt = choose_prompt(model.card, PromptChoice(is_query=False))
        longest = max(len(query_prompt), len(document_prompt))
        with self.admission.admit(estimate(model.card, [request.query, *request.documents], longest)) as permit:
            tokenized = [
                *await model.tokenizer.encode([request.query], query_prompt),
                *await model.tokenizer.encode(request.documents, document_prompt),
            ]
            names = ["query", *map(entries(request.param), range(len(request.documents)))]
            ran = await self._run(model, tokenized, permit, started, request.truncate, names.__getitem__)
            similarities = cosines(ran.rows[0], ran.rows[1:])
        scores = similarities if request.raw_scores else cosine_to_relevance(similarities)
        of_documents = tuple(index - 1 for index in ran.truncated if index)
        return self._ranked(model, request, scores, "cosine", replace(ran, truncated=of_documents), started)

    def _ranked(
        self,
        model: ServedEmbedder | ServedReranker,
        request: RerankRequest,
        scores: Scores,
        method: str,
        ran: Ran,
        started: float,
    ) -> RerankResult:
        self._report("rerank", model, len(request.documents), ran, started)
        return RerankResult(scores, model.card.id, method, ran.prompt_tokens, ran.truncated, ran.timings)

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

    async def _run(
        self,
        model: ServedEmbedder | ServedReranker,
        tokenized: Sequence[Tokenized],
        permit: Permit,
        started: float,
        truncate: bool | None,
        name: Callable[[int], str],
    ) -> Ran:
        """Schedule all rows and wait for all of them, or for the first that fails."""
        tokens = sum(len(one.row) for one in tokenized)
        permit.settle(tokens)
        truncated = tuple(index for index, one in enumerate(tokenized) if one.truncated)
        if truncated and not (self._settings.auto_truncate if truncate is None else truncate):
            raise too_long(model.card, tokenized[truncated[0]], name(truncated[0]))
        check_pooled(tokenized, name)
        self._models_or_raise()
        assert self._scheduler is not None  # attached together with the models
        submitted = perf_counter()
        waited = self._scheduler.waiting > 0 or self._scheduler.running > 0
        futures = self._scheduler.submit(model.key, (one.row for one in tokenized))
        results = await all_or_first_error(futures, name)
        queue = min(result.queue_seconds for result in results)
        return Ran(
            rows=np.stack([result.vector for result in results]),
            prompt_tokens=tokens,
            truncated=truncated,
            timings=Timings(submitted - started, queue, perf_counter() - submitted - queue),
            waited=waited,
        )

    def _report(
        self, operation: str, model: ServedEmbedder | ServedReranker, texts: int, ran: Ran, started: float
    ) -> None:
        self._telemetry.answered(
            operation,
            model.card.id,
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


def too_long(card: ModelCard, tokenized: Tokenized, name: str) -> InputTooLong:
    """In OpenAI's words: clients look for them to split a text in two."""
    return InputTooLong(
        f"This model's maximum context length is {card.max_model_len} tokens, however `{name}` has at least "
        f"{tokenized.total}. Shorten it, or let it be truncated (`truncate`, AUTO_TRUNCATE).",
        param=name,
    )


def check_pooled(tokenized: Iterable[Tokenized], name: Callable[[int], str]) -> None:
    """Refuse a text that was cut before its first token that counts: there would be nothing to take the mean of.

    Raises:
        InvalidInput: the instruction fills the model's length.
    """
    for index, one in enumerate(tokenized):
        if one.row.unpooled >= len(one.row):
            raise InvalidInput(
                f"`{name(index)}`: the instruction alone fills the model's maximum context length, nothing of the "
                f"text is left; shorten the instruction or raise MAX_MODEL_LEN.",
                param=name(index),
            )
