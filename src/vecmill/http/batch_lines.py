"""What answers the lines of batches: for each endpoint what answers its route.

/v1/rerank is an extension of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import orjson
from pydantic import TypeAdapter, ValidationError

from vecmill.batches.endpoint import Endpoint, LineResult
from vecmill.batches.input import InputLine
from vecmill.config import InferenceSettings
from vecmill.core.errors import (
    BatchFailed,
    DeadlineExceeded,
    ModelNotLoaded,
    OutOfMemory,
    Overloaded,
    Unavailable,
    VecmillError,
    as_refusal,
)
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ScoreResult
from vecmill.http.bounds import at_most
from vecmill.http.dialects.bodies import RESULT_CHARACTERS, ScoreBody
from vecmill.http.dialects.openai import OPENAI, EmbeddingsBody
from vecmill.http.dialects.registry import RERANK, AnyRerankBody, rerank_spoken
from vecmill.http.encoding import whole_body
from vecmill.http.errors import FAULT, ErrorShape, error_response, invalid_body
from vecmill.http.hints import Hint, explained, names_of, sentences
from vecmill.inference.facade import Inference

T = TypeVar("T")
logger = logging.getLogger(__name__)

EndpointName = Literal["/v1/embeddings", "/v1/rerank"]

# Batches have at most one in so many of MAX_CONCURRENT_REQUESTS; the others are left to people.
LARGEST_SHARE = 8
TRIES = 3
TOGETHER = 64  # texts; a line with more goes alone
CHARACTERS_PER_TEXT = 4096
ANY_RERANK_BODY: TypeAdapter[ScoreBody] = TypeAdapter(AnyRerankBody)


async def patiently(call: Callable[[], Awaitable[T]], tries: int = TRIES) -> T:
    """Call until the server has room.

    Raises:
        DeadlineExceeded, BatchFailed, ModelNotLoaded, OutOfMemory: it was raised at every try. Any other error at once.
    """
    while True:
        try:
            return await call()
        except (BatchFailed, DeadlineExceeded, ModelNotLoaded, OutOfMemory) as error:
            tries -= 1
            if tries <= 0:
                raise
            seconds = getattr(error, "retry_after", 1)
        except (Overloaded, Unavailable) as error:
            seconds = error.retry_after
        await asyncio.sleep(seconds)


def refused_line(shape: ErrorShape, error: Exception, hints: Sequence[Hint] = ()) -> LineResult:
    """The line's result for an error: what the route would answer."""
    error = as_refusal(error)
    if not isinstance(error, VecmillError):
        logger.error("unhandled error in a line of a batch", exc_info=error)
        error = VecmillError(FAULT)
    response = error_response(shape, explained(error, hints))
    return LineResult(response.status_code, bytes(response.body), hint=sentences(hints))


@dataclass(frozen=True, slots=True)
class LineRequest:
    """The request of one line."""

    place: int
    body: EmbeddingsBody
    request: EmbedRequest
    bare: EmbedRequest
    """The request without its inputs: lines that are equal in it run together."""
    hints: Sequence[Hint]

    @property
    def texts(self) -> int:
        return len(self.request.inputs)

    def runs_with(self, other: LineRequest) -> bool:
        """Whether both differ in their inputs alone."""
        same_kind = type(self.request.inputs[0]) is type(other.request.inputs[0])  # texts, or token ids
        return same_kind and self.bare == other.bare


class EmbeddingsEndpoint:
    """Answers lines as POST /v1/embeddings does."""

    def __init__(self, inference: Inference, threads: WorkerThreads, places: asyncio.Semaphore, max_texts: int) -> None:
        """`places`: for requests in progress, over all batches. `max_texts`: of a request."""
        self._inference = inference
        self._threads = threads
        self._places = places
        self._most = max_texts
        self._together = min(TOGETHER, max_texts)

    def texts(self, body: Mapping[str, Any]) -> int:
        """Entries of `input`; token ids of one text are one."""
        value = body.get("input")
        return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Sequence[LineResult]:
        """Answer each line."""
        texts = sum(self.texts(line.body) for line in lines)
        size = texts * CHARACTERS_PER_TEXT
        read = await self._threads.run(partial(_read, caller, lines, self._most), size=size)
        results: dict[int, LineResult] = {entry.place: entry.result for entry in read if isinstance(entry, _Refused)}
        groups = self._groups([entry for entry in read if isinstance(entry, LineRequest)])
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(self._embed(group, results))
        return [results[place] for place in range(len(lines))]

    def _groups(self, requests: Sequence[LineRequest]) -> Iterator[list[LineRequest]]:
        """Consecutive requests that can run as one, of `_together` inputs at most."""
        group: list[LineRequest] = []
        texts = 0
        for request in requests:
            if group and (
                texts + request.texts > self._together or not (request.texts and request.runs_with(group[0]))
            ):
                yield group
                group, texts = [], 0
            group.append(request)
            # A request without inputs is refused, so it must be alone.
            texts += request.texts or self._together
        if group:
            yield group

    async def _embed(self, group: Sequence[LineRequest], results: dict[int, LineResult]) -> None:
        request = group[0].request
        if len(group) > 1:
            inputs: Any = [text for line in group for text in line.request.inputs]
            request = replace(request, inputs=inputs)
        try:
            async with self._places:
                result = await patiently(partial(self._inference.embed, request), 1 if len(group) > 1 else TRIES)
            encode = partial(_encode, group, result)
            answered = await self._threads.run(encode, size=len(request.inputs) * CHARACTERS_PER_TEXT)
        except Exception as error:
            if len(group) == 1:
                results[group[0].place] = refused_line(OPENAI, error, group[0].hints)
            else:  # only the guilty lines fail
                async with asyncio.TaskGroup() as tasks:
                    for line in group:
                        tasks.create_task(self._embed([line], results))
        else:
            results.update(answered)


@dataclass(frozen=True, slots=True)
class _Refused:
    place: int
    result: LineResult


def _read(caller: Caller, lines: Sequence[InputLine], most: int) -> list[LineRequest | _Refused]:
    with at_most(most):
        return [_line_request(caller, place, line) for place, line in enumerate(lines)]


def _line_request(caller: Caller, place: int, line: InputLine) -> LineRequest | _Refused:
    hints = names_of(EmbeddingsBody).hints(line.body)
    try:
        body = EmbeddingsBody.model_validate(line.body)
        request = body.embed_request(caller)
        body.formats()  # refused before anything is computed, as over HTTP
        return LineRequest(place, body, request, replace(request, inputs=()), hints)
    except ValidationError as error:
        return _Refused(place, refused_line(OPENAI, invalid_body(error), hints))
    except VecmillError as error:
        return _Refused(place, refused_line(OPENAI, error, hints))


def _encode(group: Sequence[LineRequest], result: EmbedResult) -> dict[int, LineResult]:
    results, start = {}, 0
    for line in group:
        stop = start + line.texts
        own = result if len(group) == 1 else _part(result, start, stop)
        body = whole_body(partial(line.body.answer, own), own.embeddings, line.body.formats())
        hint = sentences(line.hints)
        results[line.place] = LineResult(200, body, own.prompt_tokens, own.cached_tokens, own.model, hint)
        start = stop
    return results


def _part(result: EmbedResult, start: int, stop: int) -> EmbedResult:
    return replace(
        result,
        embeddings=result.embeddings[start:stop],
        prompt_tokens=sum(result.tokens[start:stop]),
        tokens=result.tokens[start:stop],
        truncated=tuple(index - start for index in result.truncated if start <= index < stop),
        cached=tuple(index - start for index in result.cached if start <= index < stop),
    )


class RerankEndpoint:
    """Answers lines as POST /v1/rerank does, in each line's dialect."""

    def __init__(self, inference: Inference, threads: WorkerThreads, places: asyncio.Semaphore, max_texts: int) -> None:
        """`places`: for requests in progress, over all batches. `max_texts`: of a request."""
        self._inference = inference
        self._threads = threads
        self._places = places
        self._most = max_texts

    def texts(self, body: Mapping[str, Any]) -> int:
        """The documents, whatever this dialect calls them."""
        return max([1, *(len(value) for value in body.values() if isinstance(value, list))])

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Sequence[LineResult]:
        """Answer each line."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._answer(caller, line)) for line in lines]
        return [task.result() for task in running]

    async def _answer(self, caller: Caller, line: InputLine) -> LineResult:
        spoken = RERANK[rerank_spoken(line.body)]
        hints = names_of(spoken).hints(line.body)
        try:
            return replace(await self._score(caller, line.body), hint=sentences(hints))
        except Exception as error:
            reason = invalid_body(error) if isinstance(error, ValidationError) else error
            return refused_line(spoken.errors, reason, hints)

    async def _score(self, caller: Caller, raw: Mapping[str, Any]) -> LineResult:
        with at_most(self._most):
            body = ANY_RERANK_BODY.validate_python(raw)
        request = body.score_request(caller)
        async with self._places:
            result = await patiently(partial(self._inference.score, request))
        size = body.echoed_characters() + RESULT_CHARACTERS * len(result.scores)
        answer = await self._threads.run_if_large(partial(_serialised, body, result), size=size)
        return LineResult(200, answer, result.prompt_tokens, result.cached_tokens, result.model)


def _serialised(body: ScoreBody, result: ScoreResult) -> bytes:
    return orjson.dumps(body.answer(result, "/v1/rerank"))


def batch_endpoints(
    inference: Inference, threads: WorkerThreads, settings: InferenceSettings
) -> Mapping[str, Endpoint]:
    """The endpoints of one server, by path."""
    places = asyncio.Semaphore(max(1, settings.max_concurrent_requests // LARGEST_SHARE))
    endpoints: dict[str, Endpoint] = {
        "/v1/embeddings": EmbeddingsEndpoint(inference, threads, places, settings.max_client_batch_size),
        "/v1/rerank": RerankEndpoint(inference, threads, places, settings.max_client_batch_size),
    }
    assert set(endpoints) == set(get_args(EndpointName))
    return endpoints
