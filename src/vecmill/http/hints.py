"""Hints on names in a request that the call does not read: a misspelt field, another server's word for one.

Every client adds fields of its own, so a name that is not known refuses no request. Where it is close to a name that
the call reads, means the same on another server, or would change the answer there, the answer says so in
`X-Vecmill-Hint`; and where a request is refused for want of what was misspelt, so does the error.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from pydantic import AliasChoices, BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from vecmill.core.errors import InvalidInput, VecmillError

HEADER = "X-Vecmill-Hint"

LONGEST_NAME = 48  # characters; the longest that is read here has half of that
LONGEST_QUERY = 2048  # bytes; what is longer is no mistake of a person's
OWN = (b"x-", b"x_")  # what headers begin with that may be meant for the server; the others are HTTP's
MOST_NAMES = 16  # of a request that are not known and looked at
MOST_HINTS = 4
CLOSE = 0.8  # of difflib's ratio
CACHED_NAMES = 1024  # of each body

# Words of different servers for one thing. Where a call reads several of a line, the first of them is named; where a
# word is in several lines, the first line of which the request has nothing yet.
SYNONYMS = tuple(
    tuple(line.split())
    for line in (
        "input text texts inputs documents passages content prompt text_2 contents items sentences sentence strings "
        "document docs doc candidates corpus",
        "query text_1 source_sentence queries data_1 question search_query q input text",
        "instruction instruct instructions prompt prefix query_instruction",
        "dimensions output_dimension output_dimensionality dimensionality dims dim truncate_dim",
        "top_n top_k top limit k n",
        "normalize normalized embd_normalize normalize_embeddings",
        "return_documents return_text return_input",
        "encoding_format embedding_types embedding_type output_dtype encoding format dtype",
        "input_type task_type task text_type",
        "raw_scores return_logits return_raw_scores",
        "max_tokens_per_doc max_doc_tokens max_document_length",
        "max_tokens_per_query max_query_length",
        "truncate truncation auto_truncate",
        "truncate_prompt_tokens max_tokens max_length max_seq_length num_ctx",
        "truncation_side truncation_direction",
        "model model_id model_name",
        "job_id job",
        "tokens ids token_ids input_ids",
        "total_chunks total",
        "input_file_id input_file file_id",
        "x-request-timeout x-timeout",
    )
)

OTHER_VECTORS = "vectors are answered as the call's own dialect has them"
PROMPTED = "queries and documents have the prompts that the model has for them"

# What would change the answer elsewhere, each with why it does not here and the value that changes nothing.
NOT_READ: Mapping[str, tuple[str, object]] = {
    "add_special_tokens": ("special tokens are always added", True),
    "apply_softmax": ("`raw_scores` chooses the scale", False),
    "chat_template": ("the model's own template is used", None),
    "chat_template_kwargs": ("`instruction` is the part of a template that can be chosen", None),
    "dimensions": ("vectors keep their full size", None),
    "output_dimension": ("vectors keep their full size", None),
    "encoding_format": (OTHER_VECTORS, "float"),
    "embedding_type": (OTHER_VECTORS, "float"),
    "embedding_types": (OTHER_VECTORS, ["float"]),
    "output_dtype": (OTHER_VECTORS, "float"),
    "input_type": (PROMPTED, None),
    "is_query": (PROMPTED, None),
    "prompt_name": (PROMPTED, None),
    "task": (PROMPTED, None),
    "instruction": ("the model's own is used", None),
    "job_id": ("the header `X-Job-ID` says it", None),
    "label_token_ids": ("the model's own answers are scored", None),
    "long_text_mode": ("`truncate` says what happens to long texts", None),
    "max_chunks_per_doc": ("documents are not divided; `max_tokens_per_doc` bounds them", None),
    "max_tokens": ("`truncate_prompt_tokens` bounds a text", None),
    "max_tokens_per_doc": ("documents are bounded by the model's length", None),
    "max_tokens_per_query": ("queries are bounded by the model's length", None),
    "normalize": ("the call's own dialect decides it", True),
    "normalized": ("the call's own dialect decides it", True),
    "overlap_tokens": ("documents are not divided", None),
    "overlap": ("documents are not divided", None),
    "padding": ("no answer depends on it", "do_not_pad"),
    "pooling": ("a model has one pooling", None),
    "rank_fields": ("the whole text is scored", None),
    "raw_scores": ("", False),
    "return_colbert_vecs": ("one dense vector is given for each text", False),
    "return_sparse": ("one dense vector is given for each text", False),
    "return_documents": ("the call's own dialect decides it", False),
    "return_text": ("the call's own dialect decides it", False),
    "top_k": ("every document is answered", None),
    "top_n": ("every document is answered", None),
    "truncate": ("nothing is cut", False),
    "truncation": ("nothing is cut", False),
    "truncate_prompt_tokens": ("nothing is cut", None),
    "use_activation": ("", True),
}
# Close to a name of ours, and something else.
SOMETHING_ELSE = frozenset({"user", "top_p", "max_chunks_per_doc"})


@dataclass(frozen=True, slots=True)
class Hint:
    """A name that is not read, or not as it may be meant, and what was meant by it."""

    name: str
    meant: str | None
    is_sent: bool = False
    """Whether what is meant is in the request, too."""
    reason: str = ""
    is_read: bool = False
    """Whether the name is read after all, and `reason` says as what."""

    def __str__(self) -> str:
        """A sentence of plain ASCII on one line."""
        if self.is_read:
            return f"`{self.name}` {self.reason}."
        shown = f"`{_escaped(self.name)}` is not read here"
        if self.meant is not None:
            return f"{shown}: `{self.meant}` is." if self.is_sent else f"{shown}: did you mean `{self.meant}`?"
        return f"{shown}: {self.reason}." if self.reason else f"{shown}."


Remark = Callable[[Mapping[str, Any]], Hint | None]


def sentences(hints: Iterable[Hint]) -> str:
    """A few of them as one line."""
    return " ".join(map(str, islice(hints, MOST_HINTS)))


def _plain(name: str) -> str:
    """The same for `inputType`, `input-type` and `input_type`."""
    return name.replace("_", "").replace("-", "").lower()


class KnownNames:
    """The names that one object of a request may have; of a body's objects within it, too."""

    def __init__(
        self,
        names: Iterable[str],
        inner: Mapping[str, KnownNames] | None = None,
        elsewhere: Container[str] = (),
        remark: Remark | None = None,
    ) -> None:
        """`elsewhere`: names of NOT_READ that are worth a hint. `remark`: what is to be said of known names."""
        ordered = tuple(names)
        self._names = frozenset(ordered)
        self._inner = inner or {}
        self._elsewhere = elsewhere
        self._remark = remark
        self._by_plain = {_plain(name): name for name in ordered}
        self._synonyms = _synonyms(self._names)
        self._meant = lru_cache(CACHED_NAMES)(self._find)

    def hints(self, given: Mapping[str, Any], within: str = "") -> list[Hint]:
        """What to say of the names of an object, which stands in the field `within`.

        However many there are, no more than MOST_NAMES that are not known are looked at.
        """
        remarked = self._remark and self._remark(given)
        hints = [remarked] if remarked else []
        if not self._inner and self._names.issuperset(given):  # nearly every request
            return hints
        hints += self._of(given, within)
        for name, known in self._inner.items():
            if isinstance(value := given.get(name), dict):
                hints += known.hints(value, f"{within}{name}.")
        return hints

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def is_close(self, name: str) -> bool:
        """Whether it is none of the names and may mean one. Remembered, so asked in a fraction of a microsecond."""
        return name not in self._names and bool(self._meant(name))

    def _of(self, given: Mapping[str, Any], within: str) -> Iterator[Hint]:
        unknown = (name for name in given if name not in self._names)
        for name in islice(unknown, MOST_NAMES):
            value = given[name]
            if len(name) > LONGEST_NAME or value is None or value == {}:
                continue
            if possible := self._meant(name):
                missing = next((known for known in possible if known not in given), None)
                yield Hint(within + name, within + (missing or possible[0]), missing is None)
            elif name in self._elsewhere and value != NOT_READ[name][1]:
                yield Hint(within + name, None, reason=NOT_READ[name][0])

    def _find(self, name: str) -> tuple[str, ...]:
        """The names that may be meant; empty: none."""
        if name in SOMETHING_ELSE:
            return ()
        plain = _plain(name)
        if plain in self._by_plain:
            return (self._by_plain[plain],)
        if plain in self._synonyms:
            return self._synonyms[plain]
        letters = sorted(plain)
        turned = [known for known in self._by_plain if sorted(known) == letters]
        close = turned or get_close_matches(plain, self._by_plain, 1, CLOSE)
        return (self._by_plain[close[0]],) if close else ()


@cache
def names_of(model: type[BaseModel]) -> KnownNames:
    """The fields of a body by all their names. A body may have a class method `remark`."""
    inner: dict[str, KnownNames] = {}
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.extend(_names_of(name, field))
        if (within := next(_models(field.annotation), None)) is not None:
            inner[name] = names_of(within)
    return KnownNames(names, inner, NOT_READ, getattr(model, "remark", None))


@cache
def _names_of_headers(names: tuple[str, ...]) -> KnownNames:
    return KnownNames(names)


def _synonyms(names: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """For each word, in plain spelling, the names here of what it may mean."""
    meanings: dict[str, tuple[str, ...]] = {}
    for line in SYNONYMS:
        here = next((word for word in line if word in names), None)
        for word in map(_plain, line if here is not None else ()):
            meanings[word] = (*meanings.get(word, ()), str(here))
    return meanings


def _names_of(name: str, field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [choice for choice in alias.choices if isinstance(choice, str)]
    return [alias if isinstance(alias, str) else name]


def _escaped(name: str) -> str:
    """A client's name as it can stand in a header: nothing in it ends the line or is not ASCII."""
    whole = "".join(letter if letter.isascii() and letter.isprintable() else ascii(letter)[1:-1] for letter in name)
    return whole[: 2 * LONGEST_NAME]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models of a body's or a field's annotation; none of those that are in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _models(part)


Chooser = Callable[[Mapping[str, Any]], KnownNames]


def _chooser(field: FieldInfo) -> Chooser | None:
    """From a body to the names that it may have: of several bodies, of the one that will read it."""
    discriminator = next((part for part in field.metadata if isinstance(part, Discriminator)), None)
    if discriminator is None or not callable(discriminator.discriminator):
        model = next(_models(field.annotation), None)
        if model is None:
            return None
        known = names_of(model)
        return lambda body: known
    tag_of: Callable[[Any], Any] = discriminator.discriminator
    by_tag: dict[str, KnownNames] = {}
    for alternative in get_args(field.annotation):
        [tag] = (part.tag for part in get_args(alternative) if isinstance(part, Tag))
        by_tag[tag] = names_of(next(_models(alternative)))
    return lambda body: by_tag[tag_of(body)]


class RouteNames:
    """The names that the requests of one route may have: in the body, the query and the headers."""

    def __init__(self, dependant: Dependant, body: FieldInfo | None) -> None:
        self._body = None if body is None else _chooser(body)
        queries, headers = _parameters(dependant)
        self._query = KnownNames(queries)
        self._headers = _names_of_headers(tuple(sorted(name for name in headers if name.startswith("x-"))))

    def look_at_head(self, request: Request) -> None:
        """Note what there is to say of the query and the headers."""
        if 0 < len(request.scope["query_string"]) <= LONGEST_QUERY:
            note(request, self._query.hints(dict(request.query_params)))
        names = [name for name, _ in request.scope["headers"] if name[:2] in OWN and len(name) <= LONGEST_NAME]
        close = [name for name in (name.decode("latin-1") for name in names) if self._headers.is_close(name)]
        if close:
            note(request, self._headers.hints(dict.fromkeys(close, True)))

    def look_at_body(self, request: Request, body: Any) -> None:
        """Note what there is to say of a body's fields, and of those in the query; it is not validated yet."""
        if self._body is None or not isinstance(body, dict):
            return
        known = self._body(body)
        note(request, known.hints(body))
        if 0 < len(request.scope["query_string"]) <= LONGEST_QUERY:
            fields = (name for name in request.query_params if name in known and name not in self._query)
            note(request, [Hint(name, None, reason="it is a field of the body") for name in fields])


def _parameters(dependant: Dependant) -> tuple[set[str], set[str]]:
    queries = {field.alias for field in dependant.query_params}
    headers = {field.alias for field in dependant.header_params}
    for inner in dependant.dependencies:
        more = _parameters(inner)
        queries |= more[0]
        headers |= more[1]
    return queries, headers


def note(request: Request, hints: list[Hint]) -> None:
    """Keep them for the answer."""
    if hints:
        request.state.hints = [*hints_of(request), *hints]


def hints_of(request: Request) -> list[Hint]:
    """What is to be said to a request so far."""
    hints: list[Hint] = getattr(request.state, "hints", [])
    return hints


def add_hints(request: Request, response: Response) -> Response:
    """The answer, with what is to be said beside it."""
    if hints := hints_of(request):
        response.headers[HEADER] = sentences(hints)
    return response


def explained(error: VecmillError, hints: Iterable[Hint]) -> VecmillError:
    """The error with a hint, where it is about a field that the request has under another name."""
    if not isinstance(error, InvalidInput):
        return error
    meant = [hint for hint in hints if hint.meant == error.param and not hint.is_sent]
    if not meant:
        return error
    explained_error = copy(error)
    explained_error.message = f"{error.message.rstrip('.')}. {sentences(meant)}"
    return explained_error


def refuse_misspelt(request: Request, param: str) -> None:
    """Refuse a request that has a misspelt name of a field in its place, though the field may be left out.

    Raises:
        InvalidInput: it has.
    """
    if any(hint.meant == param and not hint.is_sent for hint in hints_of(request)):
        raise InvalidInput(f"`{param}`: Field required", param=param)
