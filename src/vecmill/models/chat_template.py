"""Chat templates of rerankers, as the pieces around an instruction, a query and a document. Reads no tensors.

Source: sentence-transformers' CrossEncoder (https://sbert.net), which gives a template messages of the roles `system`
(the instruction, if there is one), `query` and `document`; transformers' apply_chat_template, which renders them.

A template is a program of the checkpoint's. It is rendered in jinja2's sandbox, from which nothing outside can be
reached, and in a process of its own: only a process can be bounded in memory and time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from types import FrameType
from typing import Any

from jinja2 import Environment, Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vecmill.core.own_python import OWN_PYTHON
from vecmill.models.child_process import inherited_environment, limit_this_process

MOST_CHARACTERS = 65_536  # of a template
MOST_LINES = 200_000  # of compiled template that one rendering may run
MOST_BYTES, MOST_SECONDS = 268_435_456, 10  # of memory and CPU time, for all renderings
PATIENCE = 6  # times MOST_SECONDS until the process is ended, on a busy machine
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Slot(StrEnum):
    """What differs from pair to pair."""

    INSTRUCTION = "instruction"
    QUERY = "query"
    DOCUMENT = "document"


Pieces = tuple[str | Slot, ...]
"""A rendered template: fixed texts, and what stands between them."""
APART = ""
"""The piece at which a prompt is divided before it is tokenized: no token has something of both sides."""

# Texts that a template must leave as they are. Jinja, HTML, white space and nothing at all have filters of their own.
PROBES = (
    ("an instruction", "a query", "a document"),
    (" space \n", "\tspace ", "\n space\r\n "),
    ("Find", "", ""),
    ("é 你好", "ÉCOLE 你好?", "naïve <b>\"&'</b> {{ x }} {% y %} \\n"),
    ("a" * 5_000, "query " * 2_000, "document\n" * 2_000),
)
UNJOINED = "\u200c"  # with which templates of NVIDIA's mark special tokens that a text has
MARK = re.compile("\ue000(instruction|query|document)\ue001")


@dataclass(frozen=True, slots=True)
class PairPrompt:
    """The text around a pair, without an instruction and with one."""

    plain: Pieces
    instructed: Pieces
    default_instruction: str | None = None
    """Of requests that name none; None: they have `plain`."""
    variables: frozenset[str] = frozenset()
    """The variables of a chat template that may be special tokens, by name."""

    @property
    def takes_instruction(self) -> bool:
        return Slot.INSTRUCTION in self.instructed

    @property
    def fixed_text(self) -> str:
        """All that is the same around every pair."""
        return "".join(piece for piece in (*self.plain, *self.instructed) if not isinstance(piece, Slot))


class UnfitTemplateError(Exception):
    """Why a template cannot be used; continues the sentence "its chat template ..."."""


def sections(pieces: Pieces) -> list[Pieces]:
    """The parts of a prompt that are tokenized apart; of a chat template there is one."""
    parts: list[list[str | Slot]] = [[]]
    for piece in pieces:
        if piece == APART:
            parts.append([])
        else:
            parts[-1].append(piece)
    return [tuple(part) for part in parts if part]


def filled(pieces: Pieces, instruction: str, query: str, document: str) -> str:
    """The text of one pair."""
    texts = {Slot.INSTRUCTION: instruction, Slot.QUERY: query, Slot.DOCUMENT: document}
    return "".join(texts[piece] if isinstance(piece, Slot) else piece for piece in pieces)


@dataclass(frozen=True, slots=True)
class ReadTemplate:
    """What a template does to a pair."""

    plain: Pieces
    """Without an instruction."""
    instructed: Pieces
    """With one."""
    names_its_roles: bool
    """Whether it is made for pairs: it has a place for `query` and `document`, not for any role at all."""
    special_tokens: frozenset[str]
    """The names of variables that may be special tokens."""


def read_template(
    source: str, special_tokens: Mapping[str, str], options: Mapping[str, Any], *, structured: bool
) -> ReadTemplate:
    """Render a template in a process of its own. The arguments are those of `ChatTemplate`.

    Raises:
        UnfitTemplateError: see `ChatTemplate`; or it takes too much memory or time.
    """
    given = {"source": source, "special_tokens": special_tokens, "options": options, "structured": structured}
    result = _rendered_apart(json.dumps(given))
    plain, instructed = (
        tuple(Slot(text) if is_slot else text for is_slot, text in result[key]) for key in ("plain", "instructed")
    )
    return ReadTemplate(plain, instructed, result["names_its_roles"], frozenset(result["special_tokens"]))


@dataclass(frozen=True, slots=True)
class Messages:
    """What a chat template makes of a text, a message of the role `user`, after one of `system` with its prompt."""

    separator: str = ""
    """Between prompt and text. There is nothing else around them."""
    splits_special_tokens: bool = False
    """Whether the template keeps special tokens that a text has from being read as such."""


def read_messages(source: str, *, structured: bool) -> Messages:
    """Render an embedder's template in a process of its own.

    Raises:
        UnfitTemplateError: it does more to a text than to put a prompt and a separator before it.
    """
    given = {"source": source, "special_tokens": {}, "options": {}, "structured": structured, "texts": True}
    result = _rendered_apart(json.dumps(given))
    return Messages(result["separator"], result["splits_special_tokens"])


@lru_cache(maxsize=16)  # a start reads a model's template several times
def _rendered_apart(given: str) -> Mapping[str, Any]:
    """What `main` writes for this input. Raises UnfitTemplateError, also where it does not come to its end."""
    result: Mapping[str, Any] = {}
    with suppress(subprocess.TimeoutExpired, ValueError):
        done = subprocess.run(  # noqa: S603  # our own interpreter
            [*OWN_PYTHON, "-s", "-m", __name__],
            env=inherited_environment(),
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE * MOST_SECONDS,
            start_new_session=True,
            check=False,
        )
        result = json.loads(done.stdout)
    if not result:
        raise UnfitTemplateError(f"takes more than {MOST_SECONDS} s or {MOST_BYTES:,} bytes to render")
    if "unfit" in result:
        raise UnfitTemplateError(result["unfit"])
    return result


def main() -> None:
    """The process of its own: the template on its input, what it does on its output."""
    given = json.load(sys.stdin)
    limit_this_process(memory_bytes=MOST_BYTES, cpu_seconds=MOST_SECONDS)
    try:
        template = ChatTemplate(
            given["source"], given["special_tokens"], given["options"], structured=given["structured"]
        )
        result = _of_a_text(template) if given.get("texts") else _of_a_pair(template)
    except UnfitTemplateError as error:
        result = {"unfit": str(error)}
    except MemoryError:
        result = {}
    except Exception as error:  # nested too deep, for example
        result = {"unfit": f"cannot be read ({type(error).__name__})"}
    sys.stdout.write(json.dumps(result))


def _of_a_pair(template: ChatTemplate) -> dict[str, Any]:
    result: dict[str, Any] = {
        name: [(isinstance(piece, Slot), str(piece)) for piece in template.pieces(instructed=instructed)]
        for name, instructed in (("plain", False), ("instructed", True))
    }
    return result | {"names_its_roles": template.names_its_roles(), "special_tokens": sorted(template.variables)}


def _of_a_text(template: ChatTemplate) -> dict[str, Any]:
    return {"separator": template.separator(), "splits_special_tokens": template.splits_special_tokens()}


class ChatTemplate:
    """One template with what it is rendered with besides the messages."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], options: Mapping[str, Any], *, structured: bool):
        """`options` are the template's own variables; `structured`: a message's content is a list of parts.

        Raises:
            UnfitTemplateError: it is no template, or too long.
        """
        if len(source) > MOST_CHARACTERS:
            raise UnfitTemplateError(f"has {len(source)} characters; {MOST_CHARACTERS} are possible")
        environment = _environment()
        try:
            used = find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UnfitTemplateError(f"cannot be read ({error})") from None
        self.variables: frozenset[str] = frozenset(used - {"messages"})
        if missing := used.intersection(SPECIAL_TOKENS) - special_tokens.keys() - options.keys():
            raise UnfitTemplateError(f"uses {', '.join(sorted(missing))}, which the tokenizer's files do not name")
        self._context = {"tools": None, "documents": None, "add_generation_prompt": False, **special_tokens, **options}
        self._structured = structured

    def pieces(self, *, instructed: bool) -> Pieces:
        """The template with or without an instruction, as fixed texts and slots.

        Raises:
            UnfitTemplateError: it does more than put texts between texts, or in an order that is not supported.
        """
        marks = {slot: f"\ue000{slot.value}\ue001" for slot in Slot}
        parts = MARK.split(self._render(*marks.values(), instructed=instructed))
        slots = [Slot(part) for part in parts[1::2]]
        if not {Slot.QUERY, Slot.DOCUMENT} <= set(slots):
            raise UnfitTemplateError("does not carry messages of the roles `query` and `document` as they are")
        if len(set(slots)) != len(slots):
            raise UnfitTemplateError("has the instruction, the query or the document more than once")
        if slots[-1] is not Slot.DOCUMENT:
            raise UnfitTemplateError("has the query or the instruction after the document, which is not supported")
        pieces = tuple(Slot(part) if index % 2 else part for index, part in enumerate(parts) if index % 2 or part)
        if isinstance(pieces[pieces.index(Slot.DOCUMENT) - 1], Slot):
            raise UnfitTemplateError("has nothing between the query and the document")
        for probe in PROBES:
            if self._render(*probe, instructed=instructed) != filled(pieces, *probe):
                raise UnfitTemplateError("changes the texts that it is given, which is not supported")
        return pieces

    def separator(self) -> str:
        """What stands between a prompt and a text.

        Raises:
            UnfitTemplateError: it does more than to put them one after the other.
        """
        prompt, text = "\ue000prompt\ue001", "\ue000text\ue001"
        whole = self._render_text(prompt, text)
        separator = whole.removeprefix(prompt).removesuffix(text)
        for prompt, text, _ in (("\ue000prompt\ue001", "\ue000text\ue001", ""), *PROBES):
            alone, prompted = self._render_text("", text), self._render_text(prompt, text)
            if (alone, prompted) != (text, f"{prompt}{separator}{text}"):
                raise UnfitTemplateError("does more than to put a prompt before a text, which is not supported")
        return separator

    def splits_special_tokens(self) -> bool:
        """Whether it marks special tokens that stand in a text as no such tokens."""
        text = "[INST] and [IMG]"
        rendered = self._render_text("", text)
        if rendered.replace(UNJOINED, "") != text:
            raise UnfitTemplateError("changes the texts that it is given, which is not supported")
        return rendered != text

    def _render_text(self, prompt: str, text: str) -> str:
        message = self._message("user", text)
        return self._run([self._message("system", prompt), message] if prompt else [message])

    def names_its_roles(self) -> bool:
        """Whether it is made for pairs: it has a place for `query` and `document`, not for any role at all."""
        try:
            self.pieces(instructed=False)
        except UnfitTemplateError:
            return False
        mark = "\ue000any\ue001"
        try:
            return mark not in self._run([self._message("any", mark)])
        except UnfitTemplateError:
            return True

    def _render(self, instruction: str, query: str, document: str, *, instructed: bool) -> str:
        messages = [self._message("query", query), self._message("document", document)]
        return self._run([self._message("system", instruction), *messages] if instructed else messages)

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._structured else text}

    def _run(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return _rendered(self._template, {**self._context, "messages": messages})
        except UnfitTemplateError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise UnfitTemplateError(f"cannot be rendered ({type(error).__name__}: {error})") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Arithmetic is that of numbers: a text times a large number fills the memory."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not (isinstance(left, int) and isinstance(right, int)):
            raise SecurityError(f"{operator} is not supported here")
        return super().call_binop(context, operator, left, right)


def _environment() -> Environment:
    """As transformers has it. Nothing of the machine can be reached from a template."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: _raise("a score must not depend on the date (strftime_now)")
    return environment


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> str:
    raise TemplateError(message)


def _rendered(template: Template, context: Mapping[str, Any]) -> str:
    """Render, but not for ever: loops in loops end at some number of lines."""
    left = MOST_LINES

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UnfitTemplateError(f"runs for more than {MOST_LINES:,} lines")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return template.render(context)
    finally:
        sys.settrace(before)


if __name__ == "__main__":
    main()
