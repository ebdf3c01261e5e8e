"""Weaviate's sidecars: text2vec-transformers and reranker-transformers. They send no Content-Type.

Source: https://github.com/weaviate/t2v-transformers-models and https://github.com/weaviate/reranker-transformers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from vecmill.core.errors import InvalidInput, VecmillError
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, PromptChoice, ScoreRequest, ScoreResult
from vecmill.http.bounds import InputList
from vecmill.http.dialects.bodies import Dialect, EmbedBody, PromptFields, ScoreBody, contradiction, embed, example
from vecmill.http.dialects.inputs import Dimensions
from vecmill.http.errors import ErrorShape, documented
from vecmill.http.route import CallerOf, InferenceRoute
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["Weaviate"], route_class=InferenceRoute)


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://github.com/weaviate/t2v-transformers-models"""
    return {"error": error.message}


WEAVIATE = ErrorShape("weaviate", _error, busy=lambda headers: 503)


class VectorsConfig(BaseModel):
    """`pooling_strategy` is ignored: a model has one."""

    task_type: str | None = Field(None, description="`query` or `passage`.")
    dimensions: Dimensions = None


class VectorsBody(EmbedBody):
    """Keys that are not listed are ignored."""

    model_config = example({"text": "parse an ISO 8601 date", "config": {"task_type": "query"}})

    text: str | None = None
    texts: InputList[str] | None = Field(None, description="Several at once, as newer modules send them.")
    config: VectorsConfig | None = None

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""
        if self.text is not None and self.texts is not None:
            raise contradiction("text", "texts")
        texts, param = (self.texts, "texts") if self.text is None else ([self.text], "text")
        if texts is None:
            raise InvalidInput("`text`: Field required; the text to embed.", param="text")
        config = self.config or VectorsConfig()
        prompt = self.prompt_choice()
        if config.task_type in ("query", "passage"):
            of_type = PromptChoice(is_query=config.task_type == "query")
            for name in self.model_fields_set & PromptFields.model_fields.keys():
                if getattr(self, name) is not None and prompt.is_query is not of_type.is_query:
                    raise contradiction("config.task_type", name)
            prompt = of_type if prompt.instruction is None else prompt
        return EmbedRequest(
            inputs=texts,
            model=self.model,
            prompt=prompt,
            truncation=self.asked_truncation(),
            dimensions=config.dimensions,
            param=param,
            caller=caller,
        )

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """The text and its vector, or the vectors; the module reads `dims`, older ones `dim`."""
        size = result.embeddings.shape[1]
        if self.text is None:
            return {"vectors": rows[0], "dims": size}
        return {"text": self.text, "vector": rows[0][0], "dims": size, "dim": size}


@router.post("/vectors", summary="Vector of a text, or vectors of several")
async def vectors(body: VectorsBody, request: Request, caller: CallerOf) -> Response:
    """One text to one vector, several to as many."""
    return await embed(body, request, caller)


class WeaviateRerankBody(ScoreBody):
    """`property` without `model` says that Weaviate's dialect is spoken."""

    model_config = example({"query": "parse a date", "documents": ["copy a tree", "read a time"], "property": "text"})
    errors: ClassVar[ErrorShape] = WEAVIATE

    query: str
    documents: InputList[str]
    property: str | None = None

    @classmethod
    def speaks(cls, body: Mapping[str, Any]) -> bool:
        """By `property`, unless there is a `model`."""
        return "property" in body and body.get("model") is None

    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model."""
        return ScoreRequest(
            queries=[self.query],
            documents=self.documents,
            truncation=self.asked_truncation(),
            caller=caller,
        )

    def answer(self, result: ScoreResult, path: str) -> object:
        """A score for each document, in the client's order: the module puts them together by position."""
        scores = [
            {"document": document, "score": float(score)}
            for document, score in zip(self.documents, result.scores, strict=True)
        ]
        return {"query": self.query, "property": self.property, "scores": scores}

    def echoed_characters(self) -> int:
        """All documents."""
        return len(self.query) + sum(map(len, self.documents))


@router.get("/meta", summary="Metadata")
async def meta(services: ServicesOf) -> dict[str, Any]:
    """The default model."""
    cards = services.inference.cards
    if not cards:
        return {}
    card = cards[0]
    return {"model_name": card.id, "model_type": card.family, "dim": card.dimensions, "max_length": card.max_model_len}


@router.get("/.well-known/ready", summary="Readiness", status_code=204, responses=documented(503))
async def ready(services: ServicesOf) -> Response:
    """204 when requests are served, else 503."""
    return Response(status_code=204 if services.health.ready else 503)


@router.get("/.well-known/live", summary="Liveness", status_code=204)
async def live() -> Response:
    """204 while the process answers."""
    return Response(status_code=204)


DIALECT = Dialect(
    router,
    WEAVIATE,
    paths=("/vectors", "/meta", "/.well-known"),
    rerank=WeaviateRerankBody,
    any_content_type=True,
)
