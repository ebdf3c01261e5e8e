"""vLLM: /score, /detokenize and its body of /tokenize. Its other calls are OpenAI's and Cohere's.

Source: https://docs.vllm.ai/en/latest/models/pooling_models.html;
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from time import time
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from vecmill.core.errors import EmptyInput, InvalidInput
from vecmill.core.types import Caller, DetokenizeRequest, ScoreRequest, ScoreResult, TokenizeRequest, TokenizeResult
from vecmill.http.bounds import InputList
from vecmill.http.dialects.bodies import Dialect, ScoreBody, TokenizeBody, agreed, example, score
from vecmill.http.dialects.inputs import LONGEST_INSTRUCTION, Count, Ids, NotServedHere, usage
from vecmill.http.dialects.openai import OPENAI
from vecmill.http.encoding import json_response
from vecmill.http.errors import ErrorShape
from vecmill.http.route import CallerOf, InferenceRoute, NewWork
from vecmill.http.services import services_of

router = APIRouter(tags=["vLLM"], route_class=InferenceRoute)


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[InputList[str], BeforeValidator(_texts)]


class ScoreTextsBody(ScoreBody):
    """One text to compare with several, or two lists of equal length, under any of vLLM's names for the two fields."""

    model_config = example({"text_1": "parse a date", "text_2": ["read an ISO timestamp", "copy a tree"]})
    text_1: Texts = Field(validation_alias=AliasChoices("text_1", "data_1", "queries"))
    text_2: Texts = Field(validation_alias=AliasChoices("text_2", "data_2", "documents", "items"))
    instruction: str | None = Field(None, max_length=LONGEST_INSTRUCTION)
    max_tokens_per_query: Count = None
    max_tokens_per_doc: Count = None
    use_activation: bool | None = Field(
        None, validation_alias=AliasChoices("use_activation", "activation"), description="false: raw scores."
    )
    raw_scores: bool | None = Field(None, description="The model's own scale (logit or similarity) instead of 0..1.")

    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model.

        Raises:
            InvalidInput: the two lists are of different lengths, and the first is not of one.
        """
        if not self.text_1:
            raise EmptyInput("`text_1` cannot be empty; send at least one.", param="text_1")
        if len(self.text_1) not in (1, len(self.text_2)):
            raise InvalidInput(
                f"`text_1` has {len(self.text_1)} texts and `text_2` {len(self.text_2)}; send one, or as many.",
                param="text_1",
            )
        raw = None if self.use_activation is None else not self.use_activation
        return ScoreRequest(
            queries=self.text_1,
            documents=self.text_2,
            model=self.model,
            truncation=self.asked_truncation(),
            max_tokens_per_query=self.max_tokens_per_query,
            max_tokens_per_document=self.max_tokens_per_doc,
            instruction=self.instruction,
            raw_scores=bool(agreed(raw_scores=self.raw_scores, use_activation=raw)),
            param="text_2",
            query_param="text_1",
            caller=caller,
        )

    def answer(self, result: ScoreResult, path: str) -> object:
        """A score for each pair, in the client's order."""
        return {
            "id": f"score-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time()),
            "model": result.model,
            "data": [
                {"index": index, "object": "score", "score": float(value)} for index, value in enumerate(result.scores)
            ],
            "usage": usage(result),
        }


@router.post("/score", summary="Score pairs")
@router.post("/v1/score", summary="Score pairs", name="score_v1")
async def score_pairs(body: ScoreTextsBody, request: Request, caller: CallerOf) -> Response:
    """How well the texts of each pair fit together."""
    return await score(body, request, caller)


class VllmTokenizeBody(TokenizeBody):
    """`prompt` says that vLLM's dialect is spoken."""

    model_config = example({"prompt": "parse an ISO 8601 date", "return_token_strs": True})

    errors: ClassVar[ErrorShape] = OPENAI

    prompt: str
    return_token_strs: bool | None = Field(None, description="Give the tokens as the vocabulary has them, too.")
    messages: NotServedHere = None

    @classmethod
    def speaks(cls, body: Mapping[str, Any]) -> bool:
        """By `prompt`, unless there are TEI's `inputs`."""
        return "prompt" in body and "inputs" not in body

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


class DetokenizeBody(BaseModel):
    """vLLM's."""

    model_config = example({"tokens": [101, 7592, 2088, 102]})

    tokens: Ids
    model: str | None = Field(None, description="Left out: the default model.")


@router.post("/detokenize", summary="Detokenize")
async def detokenize(body: DetokenizeBody, request: Request, new_work: NewWork) -> Response:
    """Token ids to a text."""
    detokenize_request = DetokenizeRequest(body.tokens, body.model, skip_special_tokens=False, param="tokens")
    texts = await services_of(request).inference.detokenize(detokenize_request)
    return await json_response(request, lambda: {"prompt": "".join(texts)}, {}, size=sum(map(len, texts)))


DIALECT = Dialect(router, OPENAI, paths=("/score", "/detokenize"), tokenize=VllmTokenizeBody)
