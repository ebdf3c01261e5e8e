"""What a dialect is made of: bodies that turn into requests, results that turn into answers, and its declaration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vecmill.core.errors import InvalidInput
from vecmill.core.types import (
    Caller,
    EmbedRequest,
    EmbedResult,
    PromptChoice,
    ScoreRequest,
    ScoreResult,
    Scores,
    Side,
    TokenizeRequest,
    TokenizeResult,
    Truncation,
)
from vecmill.http.bounds import Word
from vecmill.http.dialects.inputs import LONGEST_INSTRUCTION, NotServedHere
from vecmill.http.encoding import (
    FLOAT,
    EmbeddingFormat,
    binary_dtype,
    json_response,
    result_headers,
    vectors_response,
)
from vecmill.http.errors import ErrorShape
from vecmill.http.route import Priority
from vecmill.http.services import services_of

V = TypeVar("V")

PIECE_CHARACTERS = 80  # of a token in JSON, about
RESULT_CHARACTERS = 64  # of an index and its score in JSON

# NIM's and Cohere's words.
WORDS = {"END": (True, Side.RIGHT), "START": (True, Side.LEFT), "NONE": (False, None)}


def agreed(**said: V | None) -> V | None:
    """What fields of one request say that mean the same thing; None: none of them is given.

    Raises:
        InvalidInput: two say different things.
    """
    given = [(name, value) for name, value in said.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise contradiction(given[0][0], name)
    return given[0][1] if given else None


def contradiction(one: str, other: str) -> InvalidInput:
    """Of two fields which of them counts is not guessed."""
    return InvalidInput(f"`{one}` and `{other}` contradict each other: leave one of them out.", param=other)


def parse_truncate(value: Any) -> Any:
    """The word in capitals; anything else is a boolean.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) and value.upper() in WORDS:
        return value.upper()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("must be true, false, NONE, START or END")


def parse_side(value: Any) -> Any:
    """`left` or `right` in any case."""
    return value.lower() if isinstance(value, str) else value


OneSide = Annotated[Side | None, BeforeValidator(parse_side), Word]


class TruncationFields(BaseModel):
    """Several that contradict each other are refused. If a request sets none, AUTO_TRUNCATE decides whether a text is
    cut, and the model's tokenizer which side: the right one, unless its files say the left."""

    truncate: Annotated[
        str | bool | None,
        BeforeValidator(parse_truncate),
        Word,
        Field(
            description="What is too long is cut (true, or Cohere's and NIM's `END`; `START` cuts the beginning) or "
            "refused (false, `NONE`). Default: AUTO_TRUNCATE."
        ),
    ] = None
    truncation: bool | None = Field(None, description="Voyage: the same as true or false.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="vLLM: cut to so many tokens, special tokens included; -1: to the model's length."
    )
    truncation_side: OneSide = Field(None, description="vLLM: the side that is cut, `left` or `right`.")
    truncation_direction: OneSide = Field(None, description="TEI: the same, `Left` or `Right`.")

    def asked_truncation(self, default: bool | None = None, max_tokens: int | None = None) -> Truncation:
        """The truncation that the request chooses; `default` where it chooses none.

        Raises:
            InvalidInput: `truncate_prompt_tokens` is 0, or two fields contradict each other.
        """
        if self.truncate_prompt_tokens == 0:
            raise InvalidInput("`truncate_prompt_tokens` must be at least 1, or -1.", param="truncate_prompt_tokens")
        word, side = WORDS[self.truncate] if isinstance(self.truncate, str) else (self.truncate, None)
        allowed = agreed(truncate=word, truncation=self.truncation)
        if allowed is None:
            allowed = default if self.truncate_prompt_tokens is None else True
        side = agreed(
            truncate=side, truncation_side=self.truncation_side, truncation_direction=self.truncation_direction
        )
        tokens = self.truncate_prompt_tokens if (self.truncate_prompt_tokens or 0) > 0 else None
        return Truncation(allowed, side, agreed(max_tokens=max_tokens, truncate_prompt_tokens=tokens))


# NIM's, Cohere's and Voyage's `input_type`, Jina's `task`.
CHOICES: dict[str, PromptChoice] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query", "code.query"), PromptChoice(is_query=True)),
    **dict.fromkeys(
        ("passage", "document", "search_document", "retrieval.passage", "code.passage"), PromptChoice(is_query=False)
    ),
    "classification": PromptChoice(task="classification"),
    "clustering": PromptChoice(task="clustering"),
    "separation": PromptChoice(task="clustering"),
    "text-matching": PromptChoice(task="text-matching"),
}


def parse_use(value: Any) -> Any:
    """One of the values, in any case.

    Raises:
        ValueError: it is none.
    """
    if value == "image":
        raise ValueError("images are not served here")
    if isinstance(value, str) and value.lower() not in CHOICES:
        raise ValueError(f"must be one of {', '.join(CHOICES)}")
    return value.lower() if isinstance(value, str) else value


Use = Annotated[str | None, BeforeValidator(parse_use), Word]


class PromptFields(BaseModel):
    """Several that contradict each other are refused. None: the model's default prompt, where its files name one."""

    instruction: str | None = Field(
        None,
        max_length=LONGEST_INSTRUCTION,
        description="The task in your own words, in place of the one in the model's query prompt; empty: none.",
    )
    prompt_name: str | None = Field(None, description="One of the model's prompts by name; /v1/models lists them.")
    task: Use = Field(None, description="Jina: `retrieval.query`, `retrieval.passage`, `text-matching`, ...")
    input_type: Use = Field(
        None, description="NIM, Cohere, Voyage: `query`, `passage`, `search_query`, `search_document`, `document`, ..."
    )
    is_query: bool | None = Field(
        None,
        description="CodeCartographer: the model's own query prompt (true) or document prompt (false) goes before "
        "each text.",
    )

    def prompt_choice(self) -> PromptChoice:
        """The prompt that the request chooses; the model's default prompt, if it has one, where it chooses none.

        An instruction replaces the prompt, not what kind of text it is for.

        Raises:
            InvalidInput: two fields contradict each other.
        """
        use = self.task or self.input_type
        role = None if self.is_query is None else PromptChoice(self.is_query)
        uses = {name: CHOICES[value] for name in ("task", "input_type") if (value := getattr(self, name))}
        choice = agreed(**uses, is_query=role) or PromptChoice()
        if use is not None:
            choice = replace(choice, use=use)
        if self.prompt_name is not None:
            self._check_named(uses if role is None else {**uses, "is_query": role})
            choice = PromptChoice(prompt_name=self.prompt_name)
        return choice if self.instruction is None else replace(choice, instruction=self.instruction)

    def _check_named(self, others: Mapping[str, PromptChoice]) -> None:
        """A prompt's name goes with a role, or with a task, that is said by the same word.

        Raises:
            InvalidInput: another field says something else.
        """
        named = CHOICES.get((self.prompt_name or "").lower())
        for name, choice in others.items():
            if choice != named and str(getattr(self, name)) != self.prompt_name:
                raise contradiction(name, "prompt_name")


def name_of(module: str) -> str:
    """What the dialect of a module is called where requests are counted and logged."""
    return module.rpartition(".")[2].replace("_", "-")


class SpokenBody(BaseModel):
    """A body that belongs to one dialect."""

    dialect: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, body: Any) -> Any:
        """A field that goes by several names is said once.

        Raises:
            InvalidInput: it is said under two of them, and differently.
        """
        if isinstance(body, dict):
            for field in cls.model_fields.values():
                if isinstance(field.validation_alias, AliasChoices):
                    names = [str(name) for name in field.validation_alias.choices]
                    agreed(**{name: body.get(name) for name in names})
        return body

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A body is of the dialect in whose file it is."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.dialect = name_of(cls.__module__)


class InferenceBody(SpokenBody, TruncationFields):
    """Keys that are not listed are ignored: every client adds some."""

    model: str | None = Field(None, description="Left out: the default model.")
    priority: Priority = None


def _text_alone(value: Any) -> Any:
    """Infinity's and NIM's `modality`.

    Raises:
        ValueError: it is more than text.
    """
    if value in (None, "text", ["text"]):
        return value
    raise ValueError("must be `text`; images, audio and video are not served here")


class EmbedBody(PromptFields, InferenceBody):
    """Texts to vectors."""

    modality: Annotated[Any, BeforeValidator(_text_alone)] = Field(None, description="`text`, or left out.")
    images: NotServedHere = None
    messages: NotServedHere = None
    late_chunking: NotServedHere = None
    return_multivector: NotServedHere = None
    return_sparse: NotServedHere = None

    @abstractmethod
    def embed_request(self, caller: Caller) -> EmbedRequest:
        """What is asked of the model."""

    def formats(self) -> Sequence[EmbeddingFormat]:
        """How the vectors are written; `answer` is given the rows in each."""
        return (FLOAT,)

    @abstractmethod
    def answer(self, result: EmbedResult, *rows: Sequence[object]) -> object:
        """The dialect's body."""


class SharedBody(SpokenBody):
    """A body on a path that several dialects share."""

    errors: ClassVar[ErrorShape]

    @classmethod
    def speaks(cls, body: Mapping[str, Any]) -> bool:
        """Whether a JSON object, not validated yet, is of this dialect and of no other."""
        return False


def _is_list(body: Mapping[str, Any], name: str) -> bool:
    return isinstance(body.get(name), list)


class ScoreBody(SharedBody, InferenceBody):
    """Documents to scores."""

    @abstractmethod
    def score_request(self, caller: Caller) -> ScoreRequest:
        """What is asked of the model."""

    @abstractmethod
    def answer(self, result: ScoreResult, path: str) -> object:
        """The dialect's body."""

    def echoed_characters(self) -> int:
        """How much of the request the answer repeats."""
        return 0

    @model_validator(mode="before")
    @classmethod
    def _one_list(cls, body: Any) -> Any:
        """The names that dialects have for the documents: whose body it is, is known by them.

        Raises:
            InvalidInput: there are two lists.
        """
        lists = [name for name in ("documents", "texts", "passages") if isinstance(body, dict) and _is_list(body, name)]
        if len(lists) > 1:
            raise contradiction(*lists[:2])
        return body


class TokenizeBody(SharedBody):
    """Texts to tokens."""

    model: str | None = Field(None, description="Left out: the default model.")
    add_special_tokens: bool | None = Field(None, description="true if left out.")

    @abstractmethod
    def tokenize_request(self) -> TokenizeRequest:
        """What is asked of the tokenizer."""

    @abstractmethod
    def answer(self, result: TokenizeResult) -> object:
        """The dialect's body."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a dialect declares: its routes, how it writes errors, and its bodies on the paths that dialects share."""

    router: APIRouter
    errors: ErrorShape
    paths: tuple[str, ...] = ()
    """Where errors have this shape: a path and all below it, or `METHOD path` alone. The longest that fits decides."""
    rerank: type[ScoreBody] | None = None
    """Its body on /rerank and its like."""
    tokenize: type[TokenizeBody] | None = None
    """Its body on /tokenize."""
    any_content_type: bool = False
    """Whether the dialect's own servers read a body as JSON whatever its Content-Type (`curl -d` sends another)."""
    name: str = ""
    """For metrics, log and traces; that of its file."""


def with_body(caller: Caller, body: InferenceBody) -> Caller:
    """The caller as its request's body has it; the body wins over the header."""
    return replace(caller, dialect=body.dialect, lane=caller.lane if body.priority is None else body.priority)


async def embed(body: EmbedBody, request: Request, caller: Caller) -> Response:
    """Answer a request for vectors."""
    formats = body.formats()
    binary = binary_dtype(request, formats)
    embed_request = body.embed_request(with_body(caller, body))
    result = await services_of(request).inference.embed(embed_request)
    return await vectors_response(request, result, lambda *rows: body.answer(result, *rows), formats, binary=binary)


async def score(body: ScoreBody, request: Request, caller: Caller) -> Response:
    """Answer a request for scores."""
    score_request = body.score_request(with_body(caller, body))
    result = await services_of(request).inference.score(score_request)
    size = body.echoed_characters() + RESULT_CHARACTERS * len(result.scores)
    path = request.url.path
    return await json_response(request, lambda: body.answer(result, path), result_headers(request, result), size=size)


async def tokenize_texts(body: TokenizeBody, request: Request) -> Response:
    """Answer a request for tokens."""
    result = await services_of(request).inference.tokenize(body.tokenize_request())
    size = PIECE_CHARACTERS * sum(map(len, result.pieces))
    return await json_response(request, lambda: body.answer(result), {}, size=size)


def best_first(scores: Scores, top_n: int | None = None) -> list[int]:
    """Indexes by descending score; equal ones keep the client's order."""
    order: list[int] = np.argsort(-scores, kind="stable")[: top_n or None].tolist()
    return order


def example(body: dict[str, Any]) -> ConfigDict:
    """A model's configuration with an example for the documentation, which runs as it stands."""
    return ConfigDict(json_schema_extra={"examples": [body]})
