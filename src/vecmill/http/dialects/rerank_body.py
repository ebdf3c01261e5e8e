"""The rerank body of Cohere, which Jina, vLLM, Infinity, llama-server and most others have taken over.

Source: https://docs.cohere.com/reference/rerank (v1 and v2); https://jina.ai/reranker/;
https://docs.vllm.ai/en/latest/models/pooling_models.html
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import Field

from vecmill.core.types import Caller, ScoreRequest, ScoreResult
from vecmill.http.dialects.bodies import ScoreBody, best_first, example
from vecmill.http.dialects.inputs import LONGEST_INSTRUCTION, Count, Documents, ranked_text, usage, warnings
from vecmill.http.error_shapes import OPENAI, ErrorShape

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
        found: list[dict[str, Any]] = [
            {"index": index, "relevance_score": float(result.scores[index])}
            for index in best_first(result.scores, top_n)
        ]
        if self.return_documents:
            for entry in found:
                entry["document"] = self.documents[entry["index"]]
        return found

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
