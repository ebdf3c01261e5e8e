"""Ollama: /api/embed, /api/embeddings and what its clients ask before.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from vecmill.core.errors import InputTooLong, ModelNotFound, VecmillError
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ModelCard, Task
from vecmill.http.bounds import Counted
from vecmill.http.dialects.bodies import Dialect, EmbedBody, embed, example
from vecmill.http.dialects.inputs import Dimensions
from vecmill.http.errors import ErrorShape, nearest
from vecmill.http.route import CallerOf, InferenceRoute
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["Ollama"], route_class=InferenceRoute)

STARTED = datetime.now(UTC).isoformat()
# Clients compare it: from 0.3 on there is /api/embed.
OLLAMA_VERSION = "0.12.0"
NANOSECONDS = 1_000_000_000


def _error(error: VecmillError, status: int) -> dict[str, object]:
    """https://github.com/ollama/ollama/blob/main/docs/api.md, with the words that its clients look for."""
    words: Mapping[type[VecmillError], str] = {
        InputTooLong: "the input length exceeds the context length: ",
        ModelNotFound: "model not found: ",
        VecmillError: "",
    }
    return {"error": nearest(words, error) + error.message}


OLLAMA = ErrorShape("ollama", _error, busy=lambda headers: 503)


def _untagged(value: Any) -> Any:
    """Ollama's clients put `:latest` after a name that has no tag."""
    return value.removesuffix(":latest") if isinstance(value, str) else value


def _texts(value: Any) -> Any:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("invalid input type: must be a string or a list of strings")
    return texts


ModelName = Annotated[str | None, BeforeValidator(_untagged)]


class OllamaEmbedBody(EmbedBody):
    """`keep_alive` and `options` are ignored: a model stays loaded, with its own context length."""

    model_config = example({"model": "all-minilm", "input": ["hello", "goodbye"]})

    model: ModelName = Field(None, description="Left out: the default model. A tag `:latest` is taken off.")
    input: Annotated[
        Any,
        BeforeValidator(_texts),
        Counted,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = Field(None, validate_default=True)
    dimensions: Dimensions = None

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""
        return EmbedRequest(
            inputs=self.input,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(default=True),
            dimensions=self.dimensions,
            param="input",
            caller=caller,
        )

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """Vectors, times in nanoseconds, tokens."""
        timings = result.timings
        total = timings.tokenize + timings.queue + timings.forward
        return {
            "model": self.model or result.model,
            "embeddings": rows[0],
            "total_duration": round(NANOSECONDS * total),
            "load_duration": 0,
            "prompt_eval_count": result.prompt_tokens,
        }


@router.post("/api/embed", summary="Embed")
async def embed_texts(body: OllamaEmbedBody, request: Request, caller: CallerOf) -> Response:
    """Texts to unit vectors. No text, or an empty one alone, loads a model in Ollama: here there is nothing to do."""
    if body.input in ([], [""]):
        return JSONResponse({"model": body.model, "embeddings": []})
    return await embed(body, request, caller)


class OllamaEmbeddingsBody(EmbedBody):
    """The call that came before /api/embed: one prompt."""

    model_config = example({"model": "all-minilm", "prompt": "hello"})

    model: ModelName = Field(None, description="Left out: the default model.")
    prompt: str = ""

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model: a vector as it comes, not normalised."""
        return EmbedRequest(
            inputs=[self.prompt],
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(default=True),
            normalize=False,
            param="prompt",
            caller=caller,
        )

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """One vector."""
        return {"embedding": rows[0][0]}


@router.post("/api/embeddings", summary="Embed one prompt")
async def embed_prompt(body: OllamaEmbeddingsBody, request: Request, caller: CallerOf) -> Response:
    """One text to one vector, not normalised."""
    if not body.prompt:
        return JSONResponse({"embedding": []})
    return await embed(body, request, caller)


@router.get("/api/tags", summary="List models")
async def tags(services: ServicesOf) -> dict[str, Any]:
    """The models that are loaded, by their ids and aliases."""
    cards = services.inference.cards
    return {"models": [_tag(card, name) for card in cards for name in (card.id, *card.aliases)]}


@router.get("/api/version", summary="Version")
async def version() -> dict[str, str]:
    """The version of Ollama whose calls these are."""
    return {"version": OLLAMA_VERSION}


class ShowBody(BaseModel):
    """A model by its name."""

    model_config = example({"model": "all-minilm"})

    model: ModelName = None
    name: ModelName = Field(None, description="What older clients call `model`.")


@router.post("/api/show", summary="Show a model")
async def show(body: ShowBody, services: ServicesOf) -> dict[str, Any]:
    """What a model is: sizes, family, capabilities."""
    card = services.inference.card(body.model or body.name)
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(card),
        "model_info": {
            "general.architecture": card.family,
            f"{card.family}.context_length": card.max_model_len,
            f"{card.family}.embedding_length": card.dimensions,
        },
        "capabilities": ["embedding"] if card.task is Task.EMBED else ["rerank"],
        "modified_at": STARTED,
    }


def _tag(card: ModelCard, name: str) -> dict[str, Any]:
    digest = card.revision.rpartition(":")[2]
    return {
        "name": name,
        "model": name,
        "modified_at": STARTED,
        "size": card.weight_bytes,
        "digest": digest,
        "details": _details(card),
    }


def _details(card: ModelCard) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": card.family,
        "families": [card.family],
        "parameter_size": "",
        "quantization_level": card.dtype,
    }


DIALECT = Dialect(router, OLLAMA, paths=("/api",), any_content_type=True)
