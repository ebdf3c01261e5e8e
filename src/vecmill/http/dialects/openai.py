"""OpenAI: /v1/embeddings, with what Jina, Voyage, NIM, vLLM and Infinity put into the same body; and /v1/models.

Source: https://platform.openai.com/docs/api-reference/embeddings and /models; https://jina.ai/embeddings/;
https://docs.voyageai.com/reference/embeddings-api; https://docs.vllm.ai/en/latest/models/pooling_models.html;
https://docs.nvidia.com/nim/nemo-retriever/text-embedding/latest/reference.html; https://michaelfeil.eu/infinity/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import AliasChoices, BeforeValidator, Field

from vecmill.core.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EmptyInput,
    InputTooLong,
    InvalidApiKey,
    ModelNotFound,
    Overloaded,
    TooManyInputs,
    VecmillError,
)
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ModelCard
from vecmill.http.capabilities import max_batch_size
from vecmill.http.dialects.bodies import Dialect, EmbedBody, agreed, contradiction, embed, example
from vecmill.http.dialects.inputs import Dimensions, EmbeddingInputs, usage
from vecmill.http.encoding import Dtype, EmbeddingFormat
from vecmill.http.errors import ErrorShape, nearest
from vecmill.http.route import CallerOf, InferenceRoute
from vecmill.http.services import Services, ServicesOf
from vecmill.inference.text_tokenizer import named_prompts

router = APIRouter(tags=["OpenAI"], route_class=InferenceRoute)


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://platform.openai.com/docs/guides/error-codes; all four keys are always there.

    Beside the envelope stand the keys that clients of Cohere (`message`), Jina and Voyage (`detail`) read on the paths
    that they have in common.
    """
    # LiteLLM takes every text with `invalid_request_error` for a bad request, a refused key too.
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    envelope = {"message": error.message, "type": kind, "param": error.param, "code": _openai_code(error)}
    return {"error": envelope, "message": error.message, "detail": error.message}


def _openai_code(error: VecmillError) -> str | None:
    codes: Mapping[type[VecmillError], str | None] = {
        InputTooLong: "context_length_exceeded",
        ModelNotFound: "model_not_found",
        InvalidApiKey: "invalid_api_key",
        TooManyInputs: "array_above_max_length",
        EmptyInput: "empty_array",
        Overloaded: "rate_limit_exceeded",
        DeadlineExceeded: "timeout",
        BodyTooLarge: "request_too_large",
        VecmillError: None,
    }
    return nearest(codes, error)


def _busy(headers: Mapping[str, str]) -> int:
    """QMD, whose requests are those of Node itself, takes every 4xx for final, as plain HTTP clients do.

    The OpenAI SDKs try again after either. Roo Code and Kilo Code count on 429, with an SDK or, without one, with a
    header `api-key`.
    """
    return 429 if "api-key" in headers or "openai/" in headers.get("user-agent", "").lower() else 503


OPENAI = ErrorShape("openai", _error, busy=_busy)


def _only_one(value: Any) -> Any:
    """Jina's clients may send a list; several formats at once are Cohere's `embedding_types`."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class EmbeddingsBody(EmbedBody):
    """Keys that are not listed are ignored: every client adds some."""

    model_config = example({"input": ["What is Deep Learning?", "def add(a, b): return a + b"]})

    input: EmbeddingInputs
    dimensions: Dimensions = None
    output_dimension: Dimensions = Field(None, description="Voyage: the same.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`float` (default), or `base64`: little-endian float32, or the bytes of `output_dtype`."
    )
    embedding_type: Annotated[
        Literal["float", "base64", "binary", "ubinary", "int8", "uint8"] | None, BeforeValidator(_only_one)
    ] = Field(
        None,
        validation_alias=AliasChoices("embedding_type", "encoding_type"),
        description="Jina: as `encoding_format`, or `binary` or `ubinary` (one bit for each dimension). LlamaIndex "
        "calls it `encoding_type`.",
    )
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] | None = Field(
        None, description="Voyage: 8 bits or 1 bit for each dimension."
    )
    normalize: bool | None = Field(
        None,
        validation_alias=AliasChoices("normalize", "normalized", "use_activation"),
        description="Unit vectors; true if left out. Jina calls it `normalized`, vLLM `use_activation`.",
    )
    embed_dtype: Literal["float32"] | None = Field(None, description="vLLM: nothing else is served here.")
    endianness: Literal["native", "little"] | None = Field(None, description="vLLM: nothing else is served here.")
    user: Any = Field(None, description="Ignored.")

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""
        return EmbedRequest(
            inputs=self.input,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(),
            dimensions=agreed(dimensions=self.dimensions, output_dimension=self.output_dimension),
            normalize=self.normalize is not False,
            param="input",
            caller=caller,
        )

    def formats(self) -> Sequence[EmbeddingFormat]:
        """The one that is asked for: a type of the numbers, and whether they come as base64. An OpenAI SDK asks for
        base64 whatever else is asked for, and reads it.

        Raises:
            InvalidInput: two fields contradict each other.
        """
        kind = self.embedding_type
        if kind == "base64" and self.encoding_format == "float":
            raise contradiction("encoding_format", "embedding_type")
        of_type: Dtype | None = None if kind == "base64" else kind
        dtype: Dtype | None = agreed(embedding_type=of_type, output_dtype=self.output_dtype)
        return (EmbeddingFormat(dtype or "float", base64="base64" in (self.encoding_format, kind)),)

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """OpenAI's list."""
        return {
            "object": "list",
            "model": result.model,
            "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows[0])],
            "usage": usage(result),
        }


@router.post("/v1/embeddings", summary="Create embeddings")
@router.post("/embeddings", summary="Create embeddings (Infinity)", name="create_embeddings_without_version")
async def create_embeddings(body: EmbeddingsBody, request: Request, caller: CallerOf) -> Response:
    """Texts to unit vectors, in input order."""
    return await embed(body, request, caller)


STARTED = int(time())

ModelName = Annotated[
    str,
    Path(
        description="An id or an alias from the list.",
        openapi_examples={"bundled": {"value": "sentence-transformers/all-MiniLM-L6-v2"}},
    ),
]


@router.get("/v1/models", summary="List models")
async def list_models(services: ServicesOf) -> dict[str, Any]:
    """The models that requests can name, the default first; after them those of GENERATION_URL.

    `vecmill models` lists what could be served besides.
    """
    own = [_model(card) for card in services.inference.cards]
    taken = {model["id"] for model in own}
    return {
        "object": "list",
        "data": [*own, *(model for model in await _generating(services) if model["id"] not in taken)],
    }


@router.get("/v1/models/{model:path}", summary="Retrieve a model")
async def retrieve_model(model: ModelName, services: ServicesOf) -> dict[str, Any]:
    """One model by its id."""
    for card in services.inference.cards:
        if model in card.names:
            return _model(card)
    for generating in await _generating(services):
        if model == generating["id"]:
            return generating
    known = ", ".join(card.id for card in services.inference.cards) or "none yet"
    raise ModelNotFound(f"The model `{model[:200]}` does not exist here; these do: {known}.", param="model")


@router.get("/models", summary="List models", tags=["Infinity"])
async def list_infinity_models(services: ServicesOf) -> dict[str, Any]:
    """The models that requests can name; `owned_by` and `backend` are values that Infinity's client insists on."""
    queued = sum(services.inference.waiting.values())
    stats = {
        "queue_fraction": services.inference.admission.tokens / services.settings.inference.max_queued_tokens,
        "queue_absolute": queued,
        "results_pending": services.inference.admission.requests,
        "batch_size": max_batch_size(services),
    }
    fixed = {"owned_by": "infinity", "backend": "torch", "stats": stats}
    cards = services.inference.cards
    return {
        "object": "list",
        "data": [{**_model(card), **fixed, "capabilities": [card.task.value]} for card in cards],
    }


async def _generating(services: Services) -> tuple[dict[str, Any], ...]:
    return () if services.generation is None else await services.generation.models()


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": STARTED,
        "owned_by": "vecmill",
        "task": card.task.value,
        "family": card.family,
        "revision": card.revision,
        "dimensions": card.dimensions,
        "supported_dimensions": _sizes(card.supported_dimensions),
        "max_model_len": card.max_model_len,
        "pooling": card.pooling,
        "similarity": card.similarity if card.dimensions else None,
        "dtype": card.dtype,
        "prompts": named_prompts(card),
        **({"adapters": list(card.adapters)} if card.adapters else {}),
        "prompts_from": card.prompts_from,
        "default_prompt_name": card.default_prompt_name,
        "aliases": list(card.aliases),
    }


def _sizes(possible: Sequence[int]) -> list[int] | dict[str, int]:
    return {"min": possible[0], "max": possible[-1]} if isinstance(possible, range) else list(possible)


# Paths that other dialects share with it have its errors, until the body says whose they are.
DIALECT = Dialect(router, OPENAI, paths=("/v1", "/v2", "/embeddings", "/models", "/rerank", "/reranking"))
