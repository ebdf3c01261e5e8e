"""NVIDIA NIM: ranking, health and metadata; its embeddings are OpenAI's with `input_type` and `truncate`.

Source: https://docs.nvidia.com/nim/nemo-retriever/text-reranking/latest/reference.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from vecmill import __version__
from vecmill.core.errors import InputTooLong, InvalidInput, MalformedBody, VecmillError
from vecmill.core.types import Caller, ScoreRequest, ScoreResult
from vecmill.http.bounds import InputList
from vecmill.http.dialects.bodies import Dialect, ScoreBody, best_first, example, score
from vecmill.http.dialects.inputs import NotServedHere, usage
from vecmill.http.errors import ErrorShape, documented
from vecmill.http.route import CallerOf, InferenceRoute
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["NIM"], route_class=InferenceRoute)

HOSTED_MODEL = {
    "name": "hosted_model",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "Ignored; the body's `model` decides.",
    "example": "llama-3_2-nv-rerankqa-1b-v2",
}


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://docs.nvidia.com/nim/nemo-retriever/text-reranking/latest/reference.html"""
    return {"object": "error", "message": error.message, "detail": error.message, "type": type(error).__name__}


NIM = ErrorShape("nim", _error, {InvalidInput: 422, InputTooLong: 400, MalformedBody: 400})


class Passage(BaseModel):
    """A text."""

    text: str
    image: NotServedHere = None


class RankingBody(ScoreBody):
    """`passages` says that NIM's dialect is spoken. What is too long is refused unless `truncate` says otherwise."""

    model_config = example(
        {
            "query": {"text": "How many people live in Berlin?"},
            "passages": [{"text": "Berlin has 3.5 million inhabitants."}, {"text": "Berlin has museums."}],
        }
    )
    errors: ClassVar[ErrorShape] = NIM

    query: Passage
    passages: InputList[Passage]
    top_n: int | None = Field(None, ge=0, description="Only the best so many; RAGFlow sends it.")

    @classmethod
    def speaks(cls, body: Mapping[str, Any]) -> bool:
        """By `passages`."""
        return "passages" in body

    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model: its own scale."""
        return ScoreRequest(
            queries=[self.query.text],
            documents=[passage.text for passage in self.passages],
            model=self.model,
            truncation=self.asked_truncation(default=False),
            raw_scores=True,
            param="passages",
            caller=caller,
        )

    def answer(self, result: ScoreResult, path: str) -> object:
        """Logits (of an embedding model: similarities), best first."""
        return {
            "rankings": [
                {"index": index, "logit": float(result.scores[index])}
                for index in best_first(result.scores, self.top_n)
            ],
            "usage": usage(result),
        }


@router.post("/v1/ranking", summary="Rank passages")
@router.post("/v1/retrieval/nvidia/reranking", summary="Rank passages (hosted path)", name="hosted_ranking")
@router.post(
    "/v1/retrieval/nvidia/{hosted_model}/reranking",
    summary="Rank passages (hosted path)",
    name="hosted_model_ranking",
    openapi_extra={"parameters": [HOSTED_MODEL]},
)
async def ranking(body: RankingBody, request: Request, caller: CallerOf) -> Response:
    """Passages sorted by their logit, best first."""
    return await score(body, request, caller)


@router.get("/v1/health/live", summary="Liveness")
async def live() -> dict[str, Any]:
    """200 while the process answers."""
    return _health("live", "live", True)


@router.get("/v1/health/ready", summary="Readiness", responses=documented(503))
async def ready(services: ServicesOf, response: Response) -> dict[str, Any]:
    """200 when requests are served, else 503."""
    is_ready = services.health.ready
    response.status_code = 200 if is_ready else 503
    return _health("ready", "ready" if is_ready else "not ready", is_ready)


def _health(key: str, message: str, value: bool) -> dict[str, Any]:
    return {"object": "health.response", "message": message, key: value}


@router.get("/v1/metadata", summary="Metadata")
async def metadata(services: ServicesOf) -> dict[str, Any]:
    """The models and the version."""
    models = [
        {"shortName": card.id, "modelUrl": card.id, "revision": card.revision} for card in services.inference.cards
    ]
    return {"version": __version__, "modelInfo": models, "assetInfo": [model["shortName"] for model in models]}


DIALECT = Dialect(router, NIM, paths=("/v1/ranking", "/v1/retrieval", "/v1/health", "/v1/metadata"), rerank=RankingBody)
