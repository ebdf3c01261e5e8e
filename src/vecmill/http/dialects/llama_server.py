"""llama.cpp's server: /embedding. Its /reranking is among the shared rerank paths, its /v1/embeddings is OpenAI's.

Source: https://github.com/ggml-org/llama.cpp/tree/master/tools/server
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from pydantic import Field

from vecmill.core.errors import InputTooLong, InvalidInput, VecmillError
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, TokenVocabulary
from vecmill.http.dialects.bodies import Dialect, EmbedBody, embed, example
from vecmill.http.dialects.inputs import EmbeddingInputs
from vecmill.http.errors import ErrorShape
from vecmill.http.route import CallerOf, InferenceRoute

router = APIRouter(tags=["llama-server"], route_class=InferenceRoute)

NOT_NORMALISED, EUCLIDEAN = -1, 2


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://github.com/ggml-org/llama.cpp/tree/master/tools/server: the code is the status."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = error.message
    if isinstance(error, InputTooLong):
        kind, message = "exceed_context_size_error", f"the input exceeds the available context size: {message}"
    return {"error": {"code": status, "message": message, "type": kind}}


LLAMA_SERVER = ErrorShape("llama-server", _error, busy=lambda headers: 503)


class EmbeddingBody(EmbedBody):
    """Keys that are not listed are ignored."""

    model_config = example({"content": "parse an ISO 8601 date"})

    content: EmbeddingInputs
    embd_normalize: int = Field(EUCLIDEAN, description="2: unit vectors; -1: as they come. No others here.")

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model. Token ids are the model's own."""
        if self.embd_normalize not in (NOT_NORMALISED, EUCLIDEAN):
            raise InvalidInput(
                "`embd_normalize` must be 2 (unit vectors) or -1 (as they come).", param="embd_normalize"
            )
        return EmbedRequest(
            inputs=self.content,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(),
            token_vocabulary=TokenVocabulary.MODEL,
            normalize=self.embd_normalize == EUCLIDEAN,
            param="content",
            caller=caller,
        )

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """Each vector in a list of its own: of a model without pooling there would be one for each token."""
        return [{"index": index, "embedding": [row]} for index, row in enumerate(rows[0])]


@router.post("/embedding", summary="Embed")
async def embedding(body: EmbeddingBody, request: Request, caller: CallerOf) -> Response:
    """Texts to vectors."""
    return await embed(body, request, caller)


DIALECT = Dialect(router, LLAMA_SERVER, paths=("/embedding",), any_content_type=True)
