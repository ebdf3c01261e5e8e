"""Ollama: /api/embed, /api/embeddings and what its clients ask before.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from vecmill.core.clock import parse_duration
from vecmill.core.errors import InputTooLong, ModelNotFound, VecmillError
from vecmill.core.types import Caller, EmbedRequest, EmbedResult, ModelCard, Task
from vecmill.http.bounds import Counted
from vecmill.http.dialects.bodies import Dialect, EmbedBody, agreed, embed, example
from vecmill.http.dialects.inputs import Dimensions
from vecmill.http.errors import ErrorShape, nearest
from vecmill.http.hints import refuse_misspelt
from vecmill.http.route import CallerOf, InferenceRoute
from vecmill.http.services import ServicesOf, services_of
from vecmill.inference.residency import ModelState, Resident

router = APIRouter(tags=["Ollama"], route_class=InferenceRoute)

STARTED = datetime.now(UTC).isoformat()
# Clients compare it: from 0.3 on there is /api/embed.
OLLAMA_VERSION = "0.12.0"
NANOSECONDS = 1_000_000_000
NEVER_SECONDS = 2**63 / NANOSECONDS


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


def _keep_alive(value: Any) -> float | None:
    return None if value is None else parse_duration(value)


KeepAlive = Annotated[
    float | None,
    BeforeValidator(_keep_alive),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]}),
    Field(
        description="How long the model stays loaded after the answer: seconds, or a duration such as `5m`; 0: not at "
        "all, negative: for ever. Left out: as before, at first UNLOAD_AFTER."
    ),
]


class OllamaEmbedBody(EmbedBody):
    """`options` are ignored: a model has its own context length."""

    model_config = example({"model": "all-minilm", "input": ["hello", "goodbye"]})

    model: ModelName = Field(None, description="Left out: the default model. A tag `:latest` is taken off.")
    input: Annotated[
        Any,
        BeforeValidator(_texts),
        Counted,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = Field(None, validate_default=True)
    dimensions: Dimensions = None
    keep_alive: KeepAlive = None

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""
        return EmbedRequest(
            inputs=self.input,
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(default=True),
            dimensions=self.dimensions,
            param="input",
            caller=replace(caller, keep_alive=self.keep_alive),
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
    """Texts to unit vectors. No text, or an empty one alone, loads the model, or with `keep_alive: 0` unloads it."""
    if body.input in ([], [""]):
        refuse_misspelt(request, "input")
        await _keep_loaded(body.model, body.keep_alive, request, caller)
        return JSONResponse({"model": body.model, "embeddings": []})
    return await embed(body, request, caller)


class OllamaEmbeddingsBody(EmbedBody):
    """The call that came before /api/embed: one prompt."""

    model_config = example({"model": "all-minilm", "prompt": "hello"})

    model: ModelName = Field(None, description="Left out: the default model.")
    prompt: str = ""
    keep_alive: KeepAlive = None

    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model: a vector as it comes, not normalised."""
        return EmbedRequest(
            inputs=[self.prompt],
            model=self.model,
            prompt=self.prompt_choice(),
            truncation=self.asked_truncation(default=True),
            normalize=False,
            param="prompt",
            caller=replace(caller, keep_alive=self.keep_alive),
        )

    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """One vector."""
        return {"embedding": rows[0][0]}


@router.post("/api/embeddings", summary="Embed one prompt")
async def embed_prompt(body: OllamaEmbeddingsBody, request: Request, caller: CallerOf) -> Response:
    """One text to one vector, not normalised."""
    if not body.prompt:
        refuse_misspelt(request, "prompt")
        await _keep_loaded(body.model, body.keep_alive, request, caller)
        return JSONResponse({"embedding": []})
    return await embed(body, request, caller)


async def _keep_loaded(model: str | None, keep_alive: float | None, request: Request, caller: Caller) -> None:
    await services_of(request).inference.keep_loaded(model, replace(caller, keep_alive=keep_alive))


@router.get("/api/ps", summary="List loaded models")
async def loaded(services: ServicesOf) -> dict[str, Any]:
    """The models that are in memory, what they take of it, and until when they stay if nobody uses them; and those that
    sleep in the machine's memory."""
    residency = services.inference.residency
    residents = residency.residents.values() if residency is not None else ()
    in_gpu = services.gpu_in_use()
    return {
        "models": [
            {
                **_tag(resident.card, resident.card.id),
                "size": resident.memory_bytes or resident.sleeping_bytes,
                "size_vram": resident.memory_bytes if in_gpu else 0,
                "expires_at": _expiry(resident),
                "context_length": resident.card.max_model_len,
                "state": resident.state.value,
            }
            for resident in residents
            if resident.state in (ModelState.LOADED, ModelState.SLEEPING)
        ]
    }


def _expiry(resident: Resident) -> str:
    """As Ollama, which writes the end of its durations, 292 years from now, for what never expires."""
    now = monotonic()
    if resident.state is ModelState.SLEEPING:  # as long as there is room
        return (datetime.now(UTC) + timedelta(seconds=NEVER_SECONDS)).isoformat()
    return (datetime.now(UTC) + timedelta(seconds=min(resident.expires(now) - now, NEVER_SECONDS))).isoformat()


@router.get("/api/tags", summary="List models")
async def tags(services: ServicesOf) -> dict[str, Any]:
    """The models that requests can name, by their ids and aliases."""
    cards = services.inference.cards
    return {"models": [_tag(card, name) for card in cards for name in card.names]}


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
    card = services.inference.card(agreed(model=body.model, name=body.name))
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
