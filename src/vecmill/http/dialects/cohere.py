"""Cohere: /v1/embed, /v2/embed, and its rerank body, which Jina, vLLM, Infinity, llama-server and others have adopted.

Source: https://docs.cohere.com/reference/embed and /rerank (v1 and v2); https://jina.ai/reranker/;
https://docs.vllm.ai/en/latest/models/pooling_models.html
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, WithJsonSchema

from vecmill.core.errors import InvalidInput, VecmillError
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ScoreRequest, ScoreResult
from vecmill.http.bounds import Counted, InputList
from vecmill.http.dialects.bodies import (
    Dialect,
    EmbedBody,
    ScoreBody,
    agreed,
    best_first,
    contradiction,
    embed,
    example,
)
from vecmill.http.dialects.inputs import (
    LONGEST_INSTRUCTION,
    Count,
    Dimensions,
    Documents,
    ranked_text,
    usage,
    warnings,
)
from vecmill.http.dialects.openai import OPENAI
from vecmill.http.encoding import EmbeddingFormat
from vecmill.http.errors import ErrorShape
from vecmill.http.route import CallerOf, InferenceRoute

router = APIRouter(tags=["Cohere"], route_class=InferenceRoute)

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
MOST_TYPES = 16


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://docs.cohere.com/reference/errors"""
    return {"message": error.message}


COHERE = ErrorShape("cohere", _error)


def _texts_of(value: Any) -> Any:
    """`inputs` as texts: the text parts of each entry's content.

    Raises:
        ValueError: an entry has another form, or an image.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError("must be a list of objects with `content`")
    return [_text_of_content(entry, index) for index, entry in enumerate(value)]


def _text_of_content(entry: Any, index: int) -> str:
    content = entry.get("content") if isinstance(entry, dict) else None
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"entry {index} must be an object with `content`")
    if any(isinstance(part, dict) and part.get("type") not in (None, "text") for part in parts):
        raise ValueError(f"entry {index} is not text; images are not served here")
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"entry {index} has a part without a string `text`")
    return "\n".join(map(str, texts))


class CohereEmbedBody(EmbedBody):
    """Keys that are not listed are ignored."""

    model_config = example(
        {"texts": ["hello", "goodbye"], "input_type": "search_document", "embedding_types": ["float", "ubinary"]}
    )
    version: ClassVar[str] = "2"

    texts: InputList[str] | None = Field(None, description="The texts; or `inputs`.")
    inputs: Annotated[
        Any, BeforeValidator(_texts_of), Counted, WithJsonSchema({"type": "array", "items": {"type": "object"}})
    ] = Field(None, description='Objects of the form `{"content": [{"type": "text", "text": "..."}]}`.')
    embedding_types: Annotated[list[EmbeddingType], Field(max_length=MOST_TYPES, fail_fast=True)] | None = Field(
        None, description="One or several. int8 and uint8 have a fixed scale, binary is the sign (docs/api.md)."
    )
    output_dimension: Dimensions = None
    max_tokens: Count = Field(None, description="Tokens per text, at most; `truncate` says what happens to the rest.")

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model; texts are cut at their end where `truncate` is left out."""
        if self.texts is not None and self.inputs is not None:
            raise contradiction("texts", "inputs")
        inputs, param = (self.inputs, "inputs") if self.texts is None else (self.texts, "texts")
        if inputs is None:
            raise InvalidInput("`texts`: Field required; the texts to embed.", param="texts")
        return EmbedRequest(
            inputs=inputs,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(default=True, max_tokens=self.max_tokens),
            dimensions=self.output_dimension,
            param=param,
            caller=caller,
        )

    @property
    def kinds(self) -> list[EmbeddingType]:
        """Each type once, in the client's order."""
        return list(dict.fromkeys(self.embedding_types or ["float"]))

    def formats(self) -> Sequence[EmbeddingFormat]:
        """One for each type."""
        return [EmbeddingFormat(base64=True) if kind == "base64" else EmbeddingFormat(kind) for kind in self.kinds]

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """By type, as version 2 has it."""
        return self._answer(result, dict(zip(self.kinds, rows, strict=True)), "embeddings_by_type")

    def _answer(self, result: EmbedResult, embeddings: object, response_type: str) -> dict[str, object]:
        return {
            "id": secrets.token_hex(16),
            "response_type": response_type,
            "embeddings": embeddings,
            "texts": self.inputs if self.texts is None else self.texts,
            "model": result.model,
            "meta": {
                "api_version": {"version": self.version},
                "billed_units": {"input_tokens": result.prompt_tokens},
                **warnings(result),
            },
        }


class CohereEmbedV1Body(CohereEmbedBody):
    """As version 2, but without `embedding_types` the answer is a bare list."""

    version: ClassVar[str] = "1"

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """A list, or by type where types were asked for."""
        if self.embedding_types:
            return super().answer(result, *rows)
        return self._answer(result, rows[0], "embeddings_floats")


@router.post("/v2/embed", summary="Embed (v2)")
async def embed_v2(body: CohereEmbedBody, request: Request, caller: CallerOf) -> Response:
    """Texts to vectors of one or several types."""
    return await embed(body, request, caller)


@router.post("/v1/embed", summary="Embed (v1)")
async def embed_v1(body: CohereEmbedV1Body, request: Request, caller: CallerOf) -> Response:
    """Texts to vectors: a list, or by type."""
    return await embed(body, request, caller)


MOST_FIELDS = 128


class RerankBody(ScoreBody):
    """`query` and `documents`. Keys that are not listed are ignored."""

    model_config = example(
        {
            "query": "How many people live in Berlin?",
            "documents": ["Berlin has 3.5 million inhabitants.", "Berlin is known for its museums."],
            "return_documents": True,
        }
    )
    errors: ClassVar[ErrorShape] = OPENAI

    query: str
    documents: Documents
    top_n: int | None = Field(None, ge=0, description="Only the best so many; 0 or left out: all.")
    top_k: int | None = Field(None, ge=0, description="Voyage: the same, and beside `top_n` no other number.")
    return_documents: bool | None = Field(None, description="Give each document back, as an object, beside its score.")
    rank_fields: Annotated[list[str], Field(max_length=MOST_FIELDS, fail_fast=True)] | None = Field(
        None, description="Which fields of the documents are scored, in this order."
    )
    max_tokens_per_doc: Count = Field(None, description="Tokens of a document that are read.")
    max_tokens_per_query: Count = Field(None, description="Tokens of the query that are read.")
    instruction: str | None = Field(
        None,
        max_length=LONGEST_INSTRUCTION,
        description="What makes a document relevant, in place of the model's default (Qwen3-Reranker).",
    )
    raw_scores: bool | None = Field(None, description="The model's own scale (logit or similarity) instead of 0..1.")

    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model."""
        agreed(top_n=self.top_n, top_k=self.top_k)
        return ScoreRequest(
            queries=[self.query],
            documents=[
                ranked_text(document, self.rank_fields, f"documents[{index}]")
                for index, document in enumerate(self.documents)
            ],
            model=self.model,
            truncation=self.asked_truncation(),
            max_tokens_per_query=self.max_tokens_per_query,
            max_tokens_per_document=self.max_tokens_per_doc,
            instruction=self.instruction,
            raw_scores=bool(self.raw_scores),
            caller=caller,
        )

    def results(self, result: ScoreResult, top_n: int | None) -> list[dict[str, Any]]:
        """The best, each with its index, score and, where asked for, document."""
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": float(result.scores[index])}
            for index in best_first(result.scores, top_n)
        ]
        if self.return_documents:
            for entry in results:
                entry["document"] = self.documents[entry["index"]]
        return results

    def answer(self, result: ScoreResult, path: str) -> object:
        """One object that Cohere's, Jina's, vLLM's and Infinity's clients can read."""
        tokens = result.prompt_tokens
        return {
            "id": f"rerank-{secrets.token_hex(8)}",
            "object": "rerank",
            "model": result.model,
            "results": self.results(result, self.top_n),
            "usage": usage(result),
            "meta": {
                "api_version": {"version": "2" if path.startswith("/v2/") else "1"},
                "billed_units": {"search_units": 1, "total_tokens": tokens},
                "tokens": {"input_tokens": tokens, "output_tokens": 0},
                "method": result.method,
                "score": "raw" if self.raw_scores else "0..1",
                **warnings(result),
            },
        }

    def echoed_characters(self) -> int:
        """All documents, where they are asked for."""
        if not self.return_documents:
            return 0
        return sum(len(value) for document in self.documents for value in document.values() if isinstance(value, str))


DIALECT = Dialect(router, COHERE, paths=("/v1/embed", "/v2/embed"), rerank=RerankBody)
