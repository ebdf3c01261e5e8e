"""TEI's /similarity, and its POST /, which huggingface_hub calls with either kind of `inputs`.

Source: https://huggingface.github.io/text-embeddings-inference/ and huggingface_hub's InferenceClient.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Tag

from vecmill.core.types import Caller, EmbedRequest
from vecmill.http.bounds import InputList
from vecmill.http.caller import CallerOf, with_priority
from vecmill.http.dialects.bodies import InferenceBody, example
from vecmill.http.dialects.prompt_fields import PromptFields
from vecmill.http.dialects.tei import TeiEmbedBody, embed_texts
from vecmill.http.encoding import json_response, result_headers
from vecmill.http.route import InferenceRoute
from vecmill.http.services import services_of
from vecmill.inference.vectors import cosines

router = APIRouter(tags=["TEI and CodeCartographer"], route_class=InferenceRoute)

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
            caller=with_priority(caller, how.priority),
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


def _kind(body: Any) -> str:
    inputs = body.get("inputs") if isinstance(body, dict) else None
    return "dialect:similarity" if isinstance(inputs, dict) else "dialect:embed"


@router.post("/", summary="Embed, or similarity")
async def embed_or_compare(
    body: Annotated[
        Annotated[TeiEmbedBody, Tag("dialect:embed")] | Annotated[SimilarityBody, Tag("dialect:similarity")],
        Discriminator(_kind),
    ],
    request: Request,
    caller: CallerOf,
) -> Response:
    """As /embed, or as /similarity where `inputs` has a `source_sentence`."""
    if isinstance(body, SimilarityBody):
        return await similarity(body, request, caller)
    return await embed_texts(body, request, caller)
