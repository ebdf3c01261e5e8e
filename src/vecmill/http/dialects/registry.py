"""All dialects, which of them a path speaks, and the paths that several share: there the body says which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Discriminator, Tag

from vecmill.http.dialects import (
    cohere,
    generation,
    llama_server,
    nim,
    ollama,
    openai,
    tei,
    vllm,
    voyage,
    weaviate,
)
from vecmill.http.dialects.bodies import Dialect, ScoreBody, SharedBody, TokenizeBody, name_of, score, tokenize_texts
from vecmill.http.errors import DETAIL, DIALECT_TAG, ErrorShape
from vecmill.http.route import CallerOf, InferenceRoute, NewWork

# On a shared path the first whose body `speaks` is spoken.
DIALECTS: tuple[Dialect, ...] = tuple(
    replace(module.DIALECT, name=name_of(module.__name__))
    for module in (openai, generation, vllm, tei, nim, weaviate, voyage, cohere, ollama, llama_server)
)

NO_DIALECT = Dialect(APIRouter(), DETAIL, name="none")
B = TypeVar("B", bound=SharedBody)


def _tag(body: type[SharedBody]) -> str:
    return f"{DIALECT_TAG}{body.__name__}"


def _by_tag(bodies: Sequence[type[B] | None]) -> dict[str, type[B]]:
    return {_tag(body): body for body in bodies if body is not None}


# The bodies of a shared path, by tag. Each is asked in turn whether it `speaks`; the first is shown first in the API's
# document, and reads what no other speaks.
RERANK = _by_tag(
    [cohere.RerankBody, *(dialect.rerank for dialect in DIALECTS if dialect.rerank is not cohere.RerankBody)]
)
TOKENIZE = _by_tag(
    [tei.TeiTokenizeBody, *(dialect.tokenize for dialect in DIALECTS if dialect.tokenize is not tei.TeiTokenizeBody)]
)


def _speaker(bodies: dict[str, type[B]]) -> Callable[[Any], str]:
    """A function from a JSON body to the tag of the body that reads it."""
    otherwise, *others = bodies

    def spoken(body: Any) -> str:
        speaking = (tag for tag in others if isinstance(body, dict) and bodies[tag].speaks(body))
        return next(speaking, otherwise)

    return spoken


rerank_spoken = _speaker(RERANK)
tokenize_spoken = _speaker(TOKENIZE)

if TYPE_CHECKING:
    AnyRerankBody = ScoreBody
    AnyTokenizeBody = TokenizeBody
else:

    def _any_of(bodies: dict[str, type[B]], spoken: Callable[[Any], str]) -> Any:
        """The annotation of a parameter that takes each of the bodies."""
        return Annotated[Union[*(Annotated[body, Tag(tag)] for tag, body in bodies.items())], Discriminator(spoken)]

    AnyRerankBody = _any_of(RERANK, rerank_spoken)
    AnyTokenizeBody = _any_of(TOKENIZE, tokenize_spoken)


BY_PATH: dict[str, Dialect] = {path: dialect for dialect in DIALECTS for path in dialect.paths}


def dialect_for(path: str, method: str) -> Dialect:
    """The dialect of a path: of the longest declared one that is the path itself or above it."""
    if (exact := BY_PATH.get(f"{method} {path}")) is not None:
        return exact
    while path:
        if path in BY_PATH:
            return BY_PATH[path]
        path = path.rpartition("/")[0]
    return NO_DIALECT


def shape_for(path: str, method: str = "") -> ErrorShape:
    """How errors on a path are written, as long as its body has not been read."""
    return dialect_for(path, method).errors


def _spoken_by(request: Request, body: type[SharedBody]) -> None:
    """From here on errors have the shape of the body's dialect, and count as its own."""
    request.state.error_shape, request.state.dialect = body.errors, body.dialect


async def _errors_as_reranked(request: Request) -> None:
    _spoken_by(request, RERANK[rerank_spoken(await request.json())])


async def _errors_as_tokenized(request: Request) -> None:
    _spoken_by(request, TOKENIZE[tokenize_spoken(await request.json())])


def dialect_name(path: str, method: str = "") -> str:
    """The name of a path's dialect, as long as its body has not been read."""
    return dialect_for(path, method).name


shared = APIRouter(route_class=InferenceRoute)


@shared.post("/v1/rerank", summary="Rerank", tags=["Rerank"])
@shared.post("/v2/rerank", summary="Rerank (Cohere v2)", name="rerank_v2", tags=["Rerank"])
@shared.post(
    "/rerank", summary="Rerank (TEI, vLLM, Infinity, Weaviate)", name="rerank_without_version", tags=["Rerank"]
)
@shared.post("/reranking", summary="Rerank (llama-server)", name="reranking", tags=["Rerank"])
@shared.post("/v1/reranking", summary="Rerank (llama-server)", name="reranking_v1", tags=["Rerank"])
async def rerank(
    body: AnyRerankBody, request: Request, shape: Annotated[None, Depends(_errors_as_reranked)], caller: CallerOf
) -> Response:
    """Documents sorted by relevance to the query, best first."""
    return await score(body, request, caller)


@shared.post("/tokenize", summary="Tokenize", tags=["TEI and CodeCartographer", "vLLM"])
async def tokenize(
    body: AnyTokenizeBody,
    request: Request,
    shape: Annotated[None, Depends(_errors_as_tokenized)],
    new_work: NewWork,
) -> Response:
    """Texts to tokens, uncut."""
    return await tokenize_texts(body, request)
