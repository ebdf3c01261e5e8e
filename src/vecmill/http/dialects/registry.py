"""The rerank paths that several dialects share. The body says which of them is spoken.

`texts` that is a list: TEI. `passages`: NIM. `property` without `model`: Weaviate. `top_k` without `top_n`: Voyage. All
else: Cohere, Jina, vLLM, Infinity, llama-server.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Discriminator, Tag

from vecmill.http.caller import CallerOf
from vecmill.http.dialects.bodies import ScoreBody, score
from vecmill.http.dialects.nim import RankingBody
from vecmill.http.dialects.rerank_body import RerankBody
from vecmill.http.dialects.tei import TeiRerankBody
from vecmill.http.dialects.voyage import VoyageRerankBody
from vecmill.http.dialects.weaviate import WeaviateRerankBody
from vecmill.http.route import InferenceRoute

router = APIRouter(tags=["Rerank"], route_class=InferenceRoute)

BODIES: dict[str, type[ScoreBody]] = {
    "dialect:cohere": RerankBody,
    "dialect:tei": TeiRerankBody,
    "dialect:nim": RankingBody,
    "dialect:weaviate": WeaviateRerankBody,
    "dialect:voyage": VoyageRerankBody,
}


def spoken(body: Any) -> str:
    """The dialect of a rerank body."""
    if not isinstance(body, dict):
        return "dialect:cohere"
    if isinstance(body.get("texts"), list):  # a client of llama-server sends `"texts": true` beside `documents`
        return "dialect:tei"
    if "passages" in body:
        return "dialect:nim"
    if "property" in body and body.get("model") is None:
        return "dialect:weaviate"
    return "dialect:voyage" if "top_k" in body and body.get("top_n") is None else "dialect:cohere"


AnyRerankBody = Annotated[
    Annotated[RerankBody, Tag("dialect:cohere")]
    | Annotated[TeiRerankBody, Tag("dialect:tei")]
    | Annotated[RankingBody, Tag("dialect:nim")]
    | Annotated[WeaviateRerankBody, Tag("dialect:weaviate")]
    | Annotated[VoyageRerankBody, Tag("dialect:voyage")],
    Discriminator(spoken),
]


async def errors_as_spoken(request: Request) -> None:
    """From here on errors have the shape of the body's dialect."""
    request.state.error_shape = BODIES[spoken(await request.json())].errors


@router.post("/v1/rerank", summary="Rerank")
@router.post("/v2/rerank", summary="Rerank (Cohere v2)", name="rerank_v2")
@router.post("/rerank", summary="Rerank (TEI, vLLM, Infinity, Weaviate)", name="rerank_without_version")
@router.post("/reranking", summary="Rerank (llama-server)", name="reranking")
@router.post("/v1/reranking", summary="Rerank (llama-server)", name="reranking_v1")
async def rerank(
    body: AnyRerankBody, request: Request, shape: Annotated[None, Depends(errors_as_spoken)], caller: CallerOf
) -> Response:
    """Documents sorted by relevance to the query, best first."""
    return await score(body, request, caller)
