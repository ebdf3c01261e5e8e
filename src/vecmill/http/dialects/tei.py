"""text-embeddings-inference: /embed (with the `is_query` that CodeCartographer adds), its rerank body, and /info.

Source: https://huggingface.github.io/text-embeddings-inference/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from vecmill import __version__
from vecmill.core.errors import NotServed
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ScoreRequest, ScoreResult, TokenVocabulary
from vecmill.http.bounds import InputList
from vecmill.http.caller import CallerOf, of_job
from vecmill.http.capabilities import max_batch_size, max_batch_tokens
from vecmill.http.dialects.bodies import EmbedBody, ScoreBody, best_first, embed, example
from vecmill.http.dialects.inputs import Dimensions, EmbeddingInputs
from vecmill.http.error_shapes import TEI, ErrorShape
from vecmill.http.route import InferenceRoute
from vecmill.http.services import ServicesOf, services_of

router = APIRouter(tags=["TEI and CodeCartographer"], route_class=InferenceRoute)

# What the document says of a call that only ever fails.
NOT_SERVED: dict[str, Any] = {"status_code": 424, "response_description": "Not served here."}


class TeiEmbedBody(EmbedBody):
    """Keys that are not listed are ignored."""

    model_config = example({"inputs": ["parse an ISO 8601 date"], "is_query": True})

    inputs: EmbeddingInputs
    normalize: bool | None = Field(None, description="Unit vectors; true if left out.")
    dimensions: Dimensions = None
    job_id: str | None = Field(None, description="The indexing job this belongs to; renews its lease.")

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model. Token ids are the model's own, as TEI has it."""
        return EmbedRequest(
            inputs=self.inputs,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(),
            token_vocabulary=TokenVocabulary.MODEL,
            dimensions=self.dimensions,
            normalize=self.normalize is not False,
            param="inputs",
            caller=of_job(caller, self.job_id) if self.job_id else caller,
        )

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """A bare list of vectors."""
        return rows[0]


@router.post("/embed", summary="Embed")
async def embed_texts(body: TeiEmbedBody, request: Request, caller: CallerOf) -> Response:
    """Texts to a bare list of vectors, in input order. `X-Job-ID` may say what `job_id` says."""
    if body.job_id:
        services_of(request).jobs.touch(body.job_id, request.state.viewer)
    return await embed(body, request, caller)


class TeiRerankBody(ScoreBody):
    """`texts` that is a list says that TEI's dialect is spoken."""

    model_config = example(
        {
            "query": "How many people live in Berlin?",
            "texts": ["Berlin has 3.5 million inhabitants.", "Berlin is known for its museums."],
        }
    )
    errors: ClassVar[ErrorShape] = TEI

    query: str
    texts: InputList[str]
    raw_scores: bool | None = Field(None, description="The model's own scale (logit or similarity) instead of 0..1.")
    return_text: bool | None = Field(None, description="Give each text back beside its score.")
    top_n: int | None = Field(None, ge=0, description="Only the best so many; LiteLLM sends it.")

    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model."""
        return ScoreRequest(
            queries=[self.query],
            documents=self.texts,
            model=self.model,
            truncation=self.asked_truncation(),
            raw_scores=bool(self.raw_scores),
            param="texts",
            caller=caller,
        )

    def answer(self, result: ScoreResult, path: str) -> object:
        """A bare list, best first."""
        return [
            {"index": index, "score": float(result.scores[index])}
            | ({"text": self.texts[index]} if self.return_text else {})
            for index in best_first(result.scores, self.top_n)
        ]

    def echoed_characters(self) -> int:
        """All texts, where they are asked for."""
        return sum(map(len, self.texts)) if self.return_text else 0


@router.get("/info", summary="Information")
async def info(services: ServicesOf) -> dict[str, Any]:
    """The default model and the limits, with the keys that TEI's clients read.

    `model_type` has exactly one key: a reranker beside the embedding model is not in it, /v1/models lists it.
    """
    cards = services.inference.cards
    card = cards[0] if cards else None
    limits = services.settings.inference
    return {
        "model_id": card and card.id,
        "model_sha": card and card.revision,
        "model_dtype": card and card.dtype,
        "model_type": {"embedding": {"pooling": str(card and card.pooling)}},
        "served_model_name": card and card.id,
        "dimensions": card and card.dimensions,
        "prompts": dict(card.prompts) if card else {},
        "max_concurrent_requests": limits.max_concurrent_requests,
        "max_input_length": card and card.max_model_len,
        "max_batch_tokens": max_batch_tokens(services),
        "max_batch_requests": max_batch_size(services),
        "max_client_batch_size": limits.max_client_batch_size,
        "auto_truncate": limits.auto_truncate,
        "tokenization_workers": limits.tokenization_workers,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


@router.post("/embed_sparse", summary="Sparse vectors: not served here", **NOT_SERVED)
@router.post("/embed_all", summary="A vector for each token: not served here", name="embed_all", **NOT_SERVED)
@router.post("/predict", summary="Classification: not served here", name="predict", **NOT_SERVED)
async def not_served(request: Request) -> Response:
    """Answered with an error that says what is served instead."""
    raise NotServed(
        f"{request.url.path} is not served here: this server gives dense vectors (/embed) and scores (/rerank, "
        f"/similarity)."
    )
