"""/v1/embeddings as an endpoint of batches: lines that ask for the same run together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from vecmill.batches.endpoint import LineResult
from vecmill.batches.input import InputLine
from vecmill.core.errors import VecmillError
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Caller, EmbedRequest, EmbedResult
from vecmill.http.bounds import at_most
from vecmill.http.dialects.line_requests import TRIES, patiently, refused_line
from vecmill.http.dialects.openai import EmbeddingsBody
from vecmill.http.encoding import whole_body
from vecmill.http.error_shapes import OPENAI
from vecmill.http.errors import invalid_body
from vecmill.inference.facade import Inference

TOGETHER = 64  # texts; a line with more goes alone
CHARACTERS_PER_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Asked:
    """What one line asks for."""

    place: int
    body: EmbeddingsBody
    request: EmbedRequest
    bare: EmbedRequest
    """The same without inputs: lines that have it in common run together."""

    @property
    def texts(self) -> int:
        return len(self.request.inputs)

    def runs_with(self, other: Asked) -> bool:
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
        asked = await self._threads.run(partial(_read, caller, lines, self._most), size=size)
        results: dict[int, LineResult] = {one.place: one.result for one in asked if isinstance(one, _Refused)}
        groups = self._groups([one for one in asked if isinstance(one, Asked)])
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(self._embed(group, results))
        return [results[place] for place in range(len(lines))]

    def _groups(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        group: list[Asked] = []
        texts = 0
        for one in asked:
            if group and (texts + one.texts > self._together or not (one.texts and one.runs_with(group[0]))):
                yield group
                group, texts = [], 0
            group.append(one)
            # One without inputs is refused, so it must be alone.
            texts += one.texts or self._together
        if group:
            yield group

    async def _embed(self, group: Sequence[Asked], results: dict[int, LineResult]) -> None:
        request = group[0].request
        if len(group) > 1:
            inputs: Any = [text for one in group for text in one.request.inputs]
            request = replace(request, inputs=inputs)
        try:
            async with self._places:
                result = await patiently(partial(self._inference.embed, request), 1 if len(group) > 1 else TRIES)
            encode = partial(_encode, group, result)
            found = await self._threads.run(encode, size=len(request.inputs) * CHARACTERS_PER_TEXT)
        except Exception as error:
            if len(group) == 1:
                results[group[0].place] = refused_line(OPENAI, error)
            else:  # only the guilty lines fail
                async with asyncio.TaskGroup() as tasks:
                    for one in group:
                        tasks.create_task(self._embed([one], results))
        else:
            results.update(found)


@dataclass(frozen=True, slots=True)
class _Refused:
    place: int
    result: LineResult


def _read(caller: Caller, lines: Sequence[InputLine], most: int) -> list[Asked | _Refused]:
    with at_most(most):
        return [_asked(caller, place, line) for place, line in enumerate(lines)]


def _asked(caller: Caller, place: int, line: InputLine) -> Asked | _Refused:
    try:
        body = EmbeddingsBody.model_validate(line.body)
        request = body.embed_request(caller)
        return Asked(place, body, request, replace(request, inputs=()))
    except ValidationError as error:
        return _Refused(place, refused_line(OPENAI, invalid_body(error)))
    except VecmillError as error:
        return _Refused(place, refused_line(OPENAI, error))


def _encode(group: Sequence[Asked], result: EmbedResult) -> dict[int, LineResult]:
    found, start = {}, 0
    for one in group:
        stop = start + one.texts
        own = result if len(group) == 1 else _part(result, start, stop)
        body = whole_body(partial(one.body.answer, own), own.embeddings, one.body.formats())
        found[one.place] = LineResult(200, body, own.prompt_tokens, own.cached_tokens, own.model)
        start = stop
    return found


def _part(result: EmbedResult, start: int, stop: int) -> EmbedResult:
    return replace(
        result,
        embeddings=result.embeddings[start:stop],
        prompt_tokens=sum(result.tokens[start:stop]),
        tokens=result.tokens[start:stop],
        truncated=tuple(index - start for index in result.truncated if start <= index < stop),
        cached=tuple(index - start for index in result.cached if start <= index < stop),
    )
