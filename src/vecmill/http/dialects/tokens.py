"""Texts to tokens and back: /tokenize (TEI's or vLLM's, by the body), TEI's /decode, vLLM's /detokenize.

Source: https://huggingface.github.io/text-embeddings-inference/;
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from vecmill.core.types import DetokenizeRequest, Piece, PromptChoice, TokenizeRequest, TokenizeResult
from vecmill.http.dialects.bodies import example
from vecmill.http.dialects.inputs import NotServedHere, parse_inputs
from vecmill.http.encoding import json_response
from vecmill.http.error_shapes import OPENAI, TEI
from vecmill.http.in_progress import NewWork
from vecmill.http.route import InferenceRoute
from vecmill.http.services import services_of

router = APIRouter(route_class=InferenceRoute)

PIECE_CHARACTERS = 80  # of a token in JSON, about
PIECES_AT_ONCE = 1000


def _texts(value: Any) -> Any:
    texts = parse_inputs(value)
    if texts and not isinstance(texts[0], str):
        raise ValueError("must be a string or a list of strings")
    return texts


def _ids(value: Any) -> Any:
    inputs = parse_inputs(value)
    if inputs and isinstance(inputs[0], str):
        raise ValueError("must be a list of token ids or a list of lists of token ids")
    return inputs


IDS_SCHEMA = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "array"}]}}
Texts = Annotated[
    Any,
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Ids = Annotated[Any, BeforeValidator(_ids), WithJsonSchema(IDS_SCHEMA)]


class TeiTokenizeBody(BaseModel):
    """`inputs` says that TEI's dialect is spoken."""

    model_config = example({"inputs": "parse an ISO 8601 date"})

    inputs: Texts
    model: str | None = Field(None, description="Left out: the default model.")
    add_special_tokens: bool | None = Field(None, description="true if left out.")
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


class VllmTokenizeBody(BaseModel):
    """`prompt` says that vLLM's dialect is spoken."""

    model_config = example({"prompt": "parse an ISO 8601 date", "return_token_strs": True})

    prompt: str
    model: str | None = Field(None, description="Left out: the default model.")
    add_special_tokens: bool | None = Field(None, description="true if left out.")
    return_token_strs: bool | None = Field(None, description="Give the tokens as the vocabulary has them, too.")
    messages: NotServedHere = None

    def tokenize_request(self) -> TokenizeRequest:
        """What is asked of the tokenizer."""
        return TokenizeRequest(
            [self.prompt], self.model, special_tokens=self.add_special_tokens is not False, param="prompt"
        )

    def answer(self, result: TokenizeResult) -> object:
        """The ids, how many they are, and how many there may be."""
        [pieces] = result.pieces
        return {
            "count": len(pieces),
            "max_model_len": result.card.max_model_len,
            "tokens": [piece.id for piece in pieces],
            "token_strs": [piece.token for piece in pieces] if self.return_token_strs else None,
        }


def _spoken(body: Any) -> str:
    return "dialect:vllm" if isinstance(body, dict) and "prompt" in body and "inputs" not in body else "dialect:tei"


async def _errors_as_spoken(request: Request) -> None:
    request.state.error_shape = OPENAI if _spoken(await request.json()) == "dialect:vllm" else TEI


@router.post("/tokenize", summary="Tokenize", tags=["TEI and CodeCartographer", "vLLM"])
async def tokenize(
    body: Annotated[
        Annotated[TeiTokenizeBody, Tag("dialect:tei")] | Annotated[VllmTokenizeBody, Tag("dialect:vllm")],
        Discriminator(_spoken),
    ],
    request: Request,
    shape: Annotated[None, Depends(_errors_as_spoken)],
    new_work: NewWork,
) -> Response:
    """Texts to tokens, uncut."""
    result = await services_of(request).inference.tokenize(body.tokenize_request())
    size = PIECE_CHARACTERS * sum(map(len, result.pieces))
    return await json_response(request, lambda: body.answer(result), {}, size=size)


class DecodeBody(BaseModel):
    """TEI's."""

    model_config = example({"ids": [101, 7592, 2088, 102]})

    ids: Ids
    model: str | None = Field(None, description="Left out: the default model.")
    skip_special_tokens: bool | None = Field(None, description="true if left out.")


@router.post("/decode", summary="Decode", tags=["TEI and CodeCartographer"])
async def decode(body: DecodeBody, request: Request, new_work: NewWork) -> Response:
    """Token ids to texts."""
    asked = DetokenizeRequest(body.ids, body.model, body.skip_special_tokens is not False)
    texts = await services_of(request).inference.detokenize(asked)
    return await json_response(request, lambda: texts, {}, size=sum(map(len, texts)))


class DetokenizeBody(BaseModel):
    """vLLM's."""

    model_config = example({"tokens": [101, 7592, 2088, 102]})

    tokens: Ids
    model: str | None = Field(None, description="Left out: the default model.")


@router.post("/detokenize", summary="Detokenize", tags=["vLLM"])
async def detokenize(body: DetokenizeBody, request: Request, new_work: NewWork) -> Response:
    """Token ids to a text."""
    asked = DetokenizeRequest(body.tokens, body.model, skip_special_tokens=False, param="tokens")
    texts = await services_of(request).inference.detokenize(asked)
    return await json_response(request, lambda: {"prompt": "".join(texts)}, {}, size=sum(map(len, texts)))
