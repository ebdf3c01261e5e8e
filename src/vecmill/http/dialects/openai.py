"""OpenAI: /v1/embeddings, with what Jina, Voyage, NIM, vLLM and Infinity put into the same body.

Source: https://platform.openai.com/docs/api-reference/embeddings; https://jina.ai/embeddings/;
https://docs.voyageai.com/reference/embeddings-api; https://docs.vllm.ai/en/latest/models/pooling_models.html;
https://docs.nvidia.com/nim/nemo-retriever/text-embedding/latest/reference.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BeforeValidator, Field

from vecmill.core.types import Caller, EmbedRequest, EmbedResult
from vecmill.http.caller import CallerOf
from vecmill.http.dialects.bodies import EmbedBody, embed, example
from vecmill.http.dialects.inputs import Dimensions, EmbeddingInputs, NotServedHere, usage
from vecmill.http.encoding import EmbeddingFormat
from vecmill.http.route import InferenceRoute

router = APIRouter(tags=["OpenAI"], route_class=InferenceRoute)


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
    ] = Field(None, description="Jina: as `encoding_format`, or `binary` or `ubinary` (one bit for each dimension).")
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
    messages: NotServedHere = None
    late_chunking: NotServedHere = None
    return_multivector: NotServedHere = None
    user: Any = Field(None, description="Ignored.")

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""
        return EmbedRequest(
            inputs=self.input,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(),
            dimensions=self.dimensions or self.output_dimension,
            normalize=self.normalize is not False,
            param="input",
            caller=caller,
        )

    def formats(self) -> Sequence[EmbeddingFormat]:
        """The one that is asked for."""
        kind = self.embedding_type or "float"
        dtype = self.output_dtype or ("float" if kind == "base64" else kind)
        return (EmbeddingFormat(dtype, base64=self.encoding_format == "base64" or kind == "base64"),)

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
