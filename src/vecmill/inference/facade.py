"""embed() and rerank(): the one way from a request to a result, whatever the dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import numpy as np

from vecmill.config import InferenceSettings
from vecmill.core.errors import (
    EmptyInput,
    InputTooLong,
    ModelLoading,
    ModelNotFound,
    NonFiniteEmbedding,
    ShuttingDown,
    TooManyInputs,
)
from vecmill.core.health import Health, Phase
from vecmill.core.types import (
    EmbedRequest,
    EmbedResult,
    Matrix,
    ModelCard,
    RerankRequest,
    RerankResult,
    Timings,
)
from vecmill.inference.admission import Admission, Permit
from vecmill.inference.finish import check_dimensions, cosines, finish, zero_to_one
from vecmill.inference.prompts import choose_prompt, with_prompt
from vecmill.inference.tokenization import TextTokenizer, Tokenized
from vecmill.scheduler.scheduler import Scheduler
from vecmill.scheduler.sequence import SequenceResult
from vecmill.telemetry.telemetry import Telemetry

SPECIAL_TOKENS = 2  # of a text, for the estimate


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that requests can name."""

    card: ModelCard
    tokenizer: TextTokenizer


@dataclass(frozen=True, slots=True)
class Vectors:
    """Full-width vectors as the model gave them, and what they cost."""

    rows: Matrix
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
        self._models: Mapping[str, ServedModel] = {}
        self._scheduler: Scheduler | None = None
        self.admission = Admission(
            settings.max_concurrent_requests, settings.max_queued_tokens, lambda: telemetry.rolling.rates()[1]
        )

    def attach(self, models: Mapping[str, ServedModel], scheduler: Scheduler) -> None:
        """Begin to serve; the first model is the default."""
        self._models = models
        self._scheduler = scheduler

    @property
    def cards(self) -> list[ModelCard]:
        """The models served, the default first; empty while loading."""
        return [model.card for model in self._models.values()]

    @property
    def waiting(self) -> int:
        """Texts that wait for a batch."""
        return self._scheduler.waiting if self._scheduler else 0

    @property
    def abandoned(self) -> int:
        """Texts freed before they were run, since the start."""
        return self._scheduler.stats.abandoned if self._scheduler else 0

    def find(self, name: str | None) -> ServedModel:
        """The model that answers to `name`: itself, the default for None, the only one unless STRICT_MODEL.

        Raises:
            ModelLoading, ModelNotFound: there is none.
        """
        self._scheduler_or_raise()
        if name is None or name == "":
            return next(iter(self._models.values()))
        if name in self._models:
            return self._models[name]
        if len(self._models) == 1 and not self._settings.strict_model:
            return next(iter(self._models.values()))
        raise ModelNotFound(
            f"The model `{name[:200]}` does not exist here; these do: {', '.join(self._models)}.",
            param="model",
        )

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Turn texts into vectors.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, Unavailable: see `vecmill.core.errors`.
        """
        started = perf_counter()
        model = self.find(request.model)
        check_dimensions(model.card, request.dimensions)
        self._check_count(len(request.inputs), request.param)
        prompt = choose_prompt(model.card, request.prompt_name, request.is_query)
        with self.admission.admit(estimate(model.card, request.inputs)) as permit:
            if isinstance(request.inputs[0], str):
                texts = cast(Sequence[str], request.inputs)
                tokenized = await model.tokenizer.encode([with_prompt(prompt, text) for text in texts])
            else:
                tokenized = model.tokenizer.check(cast(Sequence[Sequence[int]], request.inputs), request.param)
            vectors = await self._run(model, tokenized, permit, started, request.truncate, request.param)
            embeddings = finish(vectors.rows, request.dimensions, request.normalize)
        self._report("embed", model, len(request.inputs), vectors, started)
        return EmbedResult(embeddings, model.card.id, vectors.prompt_tokens, vectors.truncated, vectors.timings)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Score documents against a query, by the cosine of an embedding model.

        Raises:
            InvalidInput, ModelNotFound, Overloaded, Unavailable: see `vecmill.core.errors`.
        """
        started = perf_counter()
        model = self.find(request.model)
        self._check_count(len(request.documents), request.param)
        query_prompt = choose_prompt(model.card, None, is_query=True)
        document_prompt = choose_prompt(model.card, None, is_query=False)
        texts = [
            with_prompt(query_prompt, request.query),
            *(with_prompt(document_prompt, text) for text in request.documents),
        ]
        with self.admission.admit(estimate(model.card, texts)) as permit:
            tokenized = await model.tokenizer.encode(texts)
            vectors = await self._run(model, tokenized, permit, started, request.truncate, request.param)
            scores = cosines(vectors.rows[0], vectors.rows[1:])
        self._report("rerank", model, len(request.documents), vectors, started)
        return RerankResult(
            scores if request.raw_scores else zero_to_one(scores),
            model.card.id,
            "cosine",
            vectors.prompt_tokens,
            tuple(index - 1 for index in vectors.truncated if index),
            vectors.timings,
        )

    def _scheduler_or_raise(self) -> Scheduler:
        phase, percent, message = self._health.snapshot()
        if phase is Phase.DRAINING:
            raise ShuttingDown
        if self._scheduler is None:
            raise ModelLoading(
                f"503: the server is temporarily unavailable, the model is loading ({percent:.0f} %, {message}); "
                f"try again."
            )
        return self._scheduler

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
        model: ServedModel,
        tokenized: Sequence[Tokenized],
        permit: Permit,
        started: float,
        truncate: bool | None,
        param: str,
    ) -> Vectors:
        """Schedule all inputs and wait for all of them, or for the first that fails."""
        tokens = sum(len(one.token_ids) for one in tokenized)
        permit.settle(tokens)
        truncated = tuple(index for index, one in enumerate(tokenized) if one.truncated)
        if truncated and not (self._settings.auto_truncate if truncate is None else truncate):
            raise too_long(model.card, tokenized[truncated[0]], truncated[0], param)
        scheduler = self._scheduler_or_raise()
        submitted = perf_counter()
        waited = scheduler.waiting > 0 or scheduler.running > 0
        futures = scheduler.submit(model.card.id, (one.token_ids for one in tokenized))
        results = await all_or_first_error(futures, param)
        queue = min(result.queue_seconds for result in results)
        return Vectors(
            rows=np.stack([result.vector for result in results]),
            prompt_tokens=tokens,
            truncated=truncated,
            timings=Timings(submitted - started, queue, perf_counter() - submitted - queue),
            waited=waited,
        )

    def _report(self, operation: str, model: ServedModel, texts: int, vectors: Vectors, started: float) -> None:
        self._telemetry.answered(
            operation,
            model.card.id,
            texts=texts,
            tokens=vectors.prompt_tokens,
            truncated=len(vectors.truncated),
            total=perf_counter() - started,
            timings=vectors.timings,
            waited=vectors.waited,
        )


async def all_or_first_error(futures: Sequence[asyncio.Future[SequenceResult]], param: str) -> list[SequenceResult]:
    """Wait for every future. On the first error, or when the caller is cancelled, the rest is abandoned.

    Raises:
        NonFiniteEmbedding: with the index of the input. Any other error as it was set.
    """
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        for index, future in enumerate(futures):
            if future.done() and isinstance(future.exception(), NonFiniteEmbedding):
                raise NonFiniteEmbedding(
                    f"`{param}[{index}]`: the model gave a value that is not finite; shorten or change the text.",
                    param=f"{param}[{index}]",
                )
        failed = next((future for future in futures if future.done() and future.exception()), None)
        return [future.result() for future in ([failed] if failed else futures)]
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()  # seen: asyncio would log an error that nobody looked at


def estimate(card: ModelCard, inputs: Iterable[str] | Iterable[Sequence[int]]) -> int:
    """Tokens that the inputs will take, at most in practice: one a character or id, cut at the model's length."""
    return sum(min(len(one) + SPECIAL_TOKENS, card.max_model_len) for one in inputs)


def too_long(card: ModelCard, tokenized: Tokenized, index: int, param: str) -> InputTooLong:
    """In OpenAI's words: clients look for them to split a text in two."""
    return InputTooLong(
        f"This model's maximum context length is {card.max_model_len} tokens, however `{param}[{index}]` has at "
        f"least {tokenized.total}. Shorten it, or let it be truncated (`truncate`, AUTO_TRUNCATE).",
        param=f"{param}[{index}]",
    )
