"""Voyage's rerank body; its embeddings are OpenAI's.

Source: https://docs.voyageai.com/reference/reranker-api
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from vecmill.core.types import ScoreResult
from vecmill.http.dialects.bodies import Dialect, example
from vecmill.http.dialects.cohere import RerankBody
from vecmill.http.dialects.inputs import usage
from vecmill.http.dialects.openai import OPENAI
from vecmill.http.hints import Hint


class VoyageRerankBody(RerankBody):
    """`top_k` without `top_n` says that Voyage's dialect is spoken."""

    model_config = example(
        {
            "query": "How many people live in Berlin?",
            "documents": ["Berlin has 3.5 million inhabitants.", "Berlin is known for its museums."],
            "top_k": 1,
        }
    )

    @classmethod
    def speaks(cls, body: Mapping[str, Any]) -> bool:
        """By `top_k`, unless there is a `top_n`."""
        return "top_k" in body and body.get("top_n") is None

    @classmethod
    def remark(cls, body: Mapping[str, Any]) -> Hint | None:
        """Voyage's clients always name a model; who does not may have meant `top_n`, and looks for `results`."""
        if "model" in body or body["top_k"] is None:
            return None
        reason = "makes this Voyage's call, whose answer has `data`: `top_n` is for an answer with `results`"
        return Hint("top_k", None, reason=reason, is_read=True)

    def answer(self, result: ScoreResult, path: str) -> object:
        """`data` in place of `results`."""
        return {
            "object": "list",
            "data": self.results(result, self.top_k),
            "model": result.model,
            "usage": usage(result),
        }


DIALECT = Dialect(APIRouter(), OPENAI, rerank=VoyageRerankBody)
