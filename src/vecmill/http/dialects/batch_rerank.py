"""/v1/rerank as an endpoint of batches, an extension of OpenAI's API: a request for each line, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from vecmill.batches.endpoint import LineResult
from vecmill.batches.input import InputLine
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Caller, ScoreResult
from vecmill.http.bounds import at_most
from vecmill.http.dialects.bodies import RESULT_CHARACTERS, ScoreBody
from vecmill.http.dialects.line_requests import patiently, refused_line
from vecmill.http.dialects.rerank import BODIES, AnyRerankBody, spoken
from vecmill.http.errors import invalid_body
from vecmill.inference.facade import Inference

PATH = "/v1/rerank"
READ: TypeAdapter[ScoreBody] = TypeAdapter(AnyRerankBody)


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
        return max(1, *(len(value) for value in body.values() if isinstance(value, list)), 1)

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Sequence[LineResult]:
        """Answer each line."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._answer(caller, line)) for line in lines]
        return [task.result() for task in running]

    async def _answer(self, caller: Caller, line: InputLine) -> LineResult:
        try:
            return await self._score(caller, line.body)
        except ValidationError as error:
            return refused_line(BODIES[spoken(line.body)].errors, invalid_body(error))
        except Exception as error:
            return refused_line(BODIES[spoken(line.body)].errors, error)

    async def _score(self, caller: Caller, raw: Mapping[str, Any]) -> LineResult:
        with at_most(self._most):
            body = READ.validate_python(raw)
        asked = body.score_request(caller)
        async with self._places:
            result = await patiently(partial(self._inference.score, asked))
        size = body.echoed_characters() + RESULT_CHARACTERS * len(result.scores)
        answer = await self._threads.run_if_large(partial(_serialised, body, result), size=size)
        return LineResult(200, answer, result.prompt_tokens, result.cached_tokens, result.model)


def _serialised(body: ScoreBody, result: ScoreResult) -> bytes:
    return orjson.dumps(body.answer(result, PATH))
