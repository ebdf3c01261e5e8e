"""text-embeddings-inference: /embed, /similarity, /decode, /info and POST /, and its bodies of /rerank and /tokenize.

/embed has the `is_query` that CodeCartographer adds; POST / is what huggingface_hub calls.

Source: https://huggingface.github.io/text-embeddings-inference/ and huggingface_hub's InferenceClient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from vecmill import __version__
from vecmill.core.errors import (
    DeadlineExceeded,
    EmptyInput,
    InputTooLong,
    InvalidInput,
    MalformedBody,
    NonFiniteEmbedding,
    NotServed,
    Overloaded,
    Unavailable,
    VecmillError,
)
from vecmill.core.types import (
    Caller,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    Piece,
    PromptChoice,
    ScoreRequest,
    ScoreResult,
    TokenizeRequest,
    TokenizeResult,
    TokenVocabulary,
)
from vecmill.http.bounds import InputList
from vecmill.http.capabilities import max_batch_size, max_batch_tokens
from vecmill.http.dialects.bodies import (
    Dialect,
    EmbedBody,
    InferenceBody,
    PromptFields,
    ScoreBody,
    TokenizeBody,
    best_first,
    embed,
    example,
    with_body,
)
from vecmill.http.dialects.inputs import Dimensions, EmbeddingInputs, Ids, Texts
from vecmill.http.encoding import json_response, result_headers
from vecmill.http.errors import DIALECT_TAG, ErrorShape, nearest
from vecmill.http.route import CallerOf, InferenceRoute, NewWork, of_job
from vecmill.http.services import ServicesOf, services_of
from vecmill.inference.text_tokenizer import named_prompts
from vecmill.inference.vectors import cosines

router = APIRouter(tags=["TEI and CodeCartographer"], route_class=InferenceRoute)

PIECES_AT_ONCE = 1000  # tokens that are serialised in one go
# What the document says of a call that only ever fails.
NOT_SERVED: dict[str, Any] = {"status_code": 424, "response_description": "Not served here."}


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://huggingface.github.io/text-embeddings-inference/: {"error", "error_type"}."""
    kinds: Mapping[type[VecmillError], str] = {
        EmptyInput: "Empty",
        NonFiniteEmbedding: "Backend",
        NotServed: "Backend",
        InvalidInput: "Validation",
        Overloaded: "Overloaded",
        DeadlineExceeded: "Overloaded",
        Unavailable: "Unhealthy",
        VecmillError: "Validation" if status < 500 else "Backend",
    }
    return {"error": error.message, "error_type": nearest(kinds, error)}


TEI = ErrorShape(
    "tei",
    _error,
    # An over-long input stays a 400: TEI's own status for it changed from 413 to 422 between versions.
    {InvalidInput: 422, EmptyInput: 400, InputTooLong: 400, MalformedBody: 400, NotServed: 424},
    busy=lambda headers: 503,
)


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

    @classmethod
    def speaks(cls, body: Mapping[str, Any]) -> bool:
        """By `texts`, as a list: a client of llama-server sends `"texts": true` beside `documents`."""
        return isinstance(body.get("texts"), list)

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


class TeiTokenizeBody(TokenizeBody):
    """`inputs` says that TEI's dialect is spoken."""

    model_config = example({"inputs": "parse an ISO 8601 date"})

    errors: ClassVar[ErrorShape] = TEI

    inputs: Texts
    prompt_name: str | None = Field(None, description="One of the model's prompts by name; it goes before the text.")

    def tokenize_request(self) -> TokenizeRequest:
        """What is asked of the tokenizer."""
        return TokenizeRequest(
            self.inputs, self.model, PromptChoice(prompt_name=self.prompt_name), self.add_special_tokens is not False
        )

    def answer(self, result: TokenizeResult) -> object:
        """The pieces of each text, with their places in characters."""
        return [_tei_pieces(pieces) for pieces in result.pieces]


def _tei_pieces(pieces: Sequence[Piece]) -> orjson.Fragment:
    """As JSON, some at a time: hundreds of thousands of objects would keep the garbage collector busy."""
    parts = (pieces[start : start + PIECES_AT_ONCE] for start in range(0, len(pieces), PIECES_AT_ONCE))
    return orjson.Fragment(b"[%b]" % b",".join(orjson.dumps([*map(_tei_piece, part)])[1:-1] for part in parts))


def _tei_piece(piece: Piece) -> dict[str, object]:
    return {
        "id": piece.id,
        "text": piece.text,
        "special": piece.special,
        "start": piece.start,
        "stop": piece.stop,
    }


class DecodeBody(BaseModel):
    """TEI's."""

    model_config = example({"ids": [101, 7592, 2088, 102]})

    ids: Ids
    model: str | None = Field(None, description="Left out: the default model.")
    skip_special_tokens: bool | None = Field(None, description="true if left out.")


@router.post("/decode", summary="Decode")
async def decode(body: DecodeBody, request: Request, new_work: NewWork) -> Response:
    """Token ids to texts."""
    detokenize_request = DetokenizeRequest(body.ids, body.model, body.skip_special_tokens is not False)
    texts = await services_of(request).inference.detokenize(detokenize_request)
    return await json_response(request, lambda: texts, {}, size=sum(map(len, texts)))


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
        "deterministic": services.settings.model.deterministic,
        "model_type": {"embedding": {"pooling": str(card and card.pooling)}},
        "served_model_name": card and card.id,
        "dimensions": card and card.dimensions,
        "prompts": named_prompts(card) if card else {},
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


SCORE_CHARACTERS = 24


class Sentences(BaseModel):
    """One sentence and those that it is compared with."""

    source_sentence: str
    sentences: InputList[str]


class SimilarityParameters(PromptFields, InferenceBody):
    """As in /embed."""


class SimilarityBody(BaseModel):
    """Keys that are not listed are ignored."""

    model_config = example(
        {"inputs": {"source_sentence": "parse a date", "sentences": ["read an ISO timestamp", "copy a tree"]}}
    )

    inputs: Sentences
    parameters: SimilarityParameters | None = None

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model: all sentences, the source first."""
        how = self.parameters or SimilarityParameters()
        return EmbedRequest(
            inputs=[self.inputs.source_sentence, *self.inputs.sentences],
            model=how.model,
            prompt=how.prompt_choice(),
            truncation=how.asked_truncation(),
            param="inputs",
            caller=with_body(caller, how),
        )


@router.post("/similarity", summary="Similarity")
async def similarity(body: SimilarityBody, request: Request, caller: CallerOf) -> Response:
    """Cosine of one sentence with each of the others, in their order."""
    result = await services_of(request).inference.embed(body.embed_request(caller))
    source, others = result.embeddings[:1], result.embeddings[1:]
    size = others.nbytes + SCORE_CHARACTERS * len(others)
    return await json_response(
        request, lambda: cosines(source, others).tolist(), result_headers(request, result), size=size
    )


EMBED, SIMILARITY = f"{DIALECT_TAG}embed", f"{DIALECT_TAG}similarity"


def _kind(body: Any) -> str:
    inputs = body.get("inputs") if isinstance(body, dict) else None
    return SIMILARITY if isinstance(inputs, dict) else EMBED


@router.post("/", summary="Embed, or similarity")
async def embed_or_compare(
    body: Annotated[
        Annotated[TeiEmbedBody, Tag(EMBED)] | Annotated[SimilarityBody, Tag(SIMILARITY)],
        Discriminator(_kind),
    ],
    request: Request,
    caller: CallerOf,
) -> Response:
    """As /embed, or as /similarity where `inputs` has a `source_sentence`."""
    if isinstance(body, SimilarityBody):
        return await similarity(body, request, caller)
    return await embed_texts(body, request, caller)


DIALECT = Dialect(
    router,
    TEI,
    paths=(
        "/embed",
        "/embed_all",
        "/embed_sparse",
        "/predict",
        "/similarity",
        "/tokenize",
        "/decode",
        "/info",
        "POST /",
    ),
    rerank=TeiRerankBody,
    tokenize=TeiTokenizeBody,
)
