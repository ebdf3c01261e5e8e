"""What all dialects have in common: a body turns into a request, a result into an answer, and nothing else happens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from fastapi import Request, Response
from pydantic import ConfigDict, Field

from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ScoreRequest, ScoreResult, Scores
from vecmill.http.caller import Priority, with_priority
from vecmill.http.dialects.prompt_fields import PromptFields
from vecmill.http.dialects.truncation_fields import TruncationFields
from vecmill.http.encoding import FLOAT, EmbeddingFormat, json_response, result_headers, vectors_response
from vecmill.http.error_shapes import ErrorShape
from vecmill.http.services import services_of

RESULT_CHARACTERS = 64  # of an index and its score in JSON


class InferenceBody(TruncationFields):
    """Keys that are not listed are ignored: every client adds some."""

    model: str | None = Field(None, description="Left out: the default model.")
    priority: Priority = None


class EmbedBody(PromptFields, InferenceBody):
    """Texts to vectors."""

    @abstractmethod
    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""

    def formats(self) -> Sequence[EmbeddingFormat]:
        """How the vectors are written; `answer` is given the rows in each."""
        return (FLOAT,)

    @abstractmethod
    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """The dialect's body."""


class ScoreBody(InferenceBody):
    """Documents to scores."""

    errors: ClassVar[ErrorShape]
    """For paths that several dialects share."""

    @abstractmethod
    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model."""

    @abstractmethod
    def answer(self, result: ScoreResult, path: str) -> object:
        """The dialect's body."""

    def echoed_characters(self) -> int:
        """How much of the request the answer repeats."""
        return 0


async def embed(body: EmbedBody, request: Request, caller: Caller) -> Response:
    """Answer a request for vectors."""
    asked = body.embed_request(with_priority(caller, body.priority))
    result = await services_of(request).inference.embed(asked)
    return await vectors_response(request, result, lambda *rows: body.answer(result, *rows), body.formats())


async def score(body: ScoreBody, request: Request, caller: Caller) -> Response:
    """Answer a request for scores."""
    asked = body.score_request(with_priority(caller, body.priority))
    result = await services_of(request).inference.score(asked)
    size = body.echoed_characters() + RESULT_CHARACTERS * len(result.scores)
    path = request.url.path
    return await json_response(request, lambda: body.answer(result, path), result_headers(request, result), size=size)


def best_first(scores: Scores, top_n: int | None = None) -> list[int]:
    """Indexes by descending score; equal ones keep the client's order."""
    order: list[int] = np.argsort(-scores, kind="stable")[: top_n or None].tolist()
    return order


def example(body: dict[str, Any]) -> ConfigDict:
    """A model's configuration with an example for the documentation, which runs as it stands."""
    return ConfigDict(json_schema_extra={"examples": [body]})
