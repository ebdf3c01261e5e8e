"""Texts to rows for an embedding model: which prompt goes before, special tokens around, cut to the model's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from vecmill.core.errors import InvalidInput
from vecmill.core.types import INSTRUCTION_PLACE, ModelCard, PromptChoice, Row, Side, Task, Truncation
from vecmill.inference.token_ids import check_ids
from vecmill.inference.tokenizer_pool import TokenizerPool, missing_prompt
from vecmill.models.family import TextFormat

NO_LIMIT = Truncation()


@dataclass(eq=False, slots=True)
class Tokenized:
    """A ready row."""

    row: Row
    total: int
    """Tokens before the cut, at least; what the request itself asked to cut off is not counted."""
    shortened: bool = False
    """Cut because the request asked for it."""
    key: bytes | None = None
    """What its vector is kept under."""

    @property
    def tokens(self) -> int:
        """Of the row."""
        return len(self.row)

    @property
    def too_long(self) -> bool:
        """Cut, and the request did not ask for it."""
        return self.total > len(self.row)

    @property
    def truncated(self) -> bool:
        """Cut for whatever reason."""
        return self.shortened or self.too_long

    def marked_as_cut(self) -> Tokenized:
        """The row of a text that had been cut before it was tokenized."""
        return replace(self, shortened=True)


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a request's truncation means for each of its texts."""

    limit: int
    """Tokens of a row, at most."""
    room: int
    """Of them for the text, without the special tokens."""
    from_left: bool
    keeps_prompt: bool
    """Where the beginning is cut: whether the prompt's tokens stay."""
    shortens: bool
    """Whether the request itself set the limit and allows the cut: a longer row counts as shortened, not too long."""


class TextTokenizer:
    """One embedding model's tokenizer."""

    def __init__(self, pool: TokenizerPool, text_format: TextFormat, max_model_len: int, vocab_size: int) -> None:
        self.pool = pool
        self._format = text_format
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._prefix, self._suffix = self._special_tokens()
        added = pool.tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What goes before and after a text."""
        prefix, suffix = self.pool.around.before, self.pool.around.after
        if self._format.end_token is not None:
            end = self.pool.special(self._format.end_token)
            if end is not None and suffix[-1:] != [end]:
                suffix = [*suffix, end]
        return prefix, suffix

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        return self._prefix, self._suffix

    @property
    def special_tokens(self) -> int:
        """How many there are."""
        return len(self._prefix) + len(self._suffix)

    def side(self, truncation: Truncation) -> Side:
        """Which end of a text that is too long is cut: the request's choice, else the tokenizer's."""
        return truncation.side or self.pool.truncation_side

    async def encode(
        self, texts: Sequence[str], prompt: str = "", truncation: Truncation = NO_LIMIT
    ) -> list[Tokenized]:
        """Tokenize in the threads; the results are in order.

        Raises:
            InvalidInput: the request's limit leaves no room for any text.
        """
        return await self.pool.map(await self.encoder(prompt, truncation), texts)

    async def encoder(
        self, prompt: str = "", truncation: Truncation = NO_LIMIT, adapter: int | None = None
    ) -> Callable[[Sequence[str]], list[Tokenized]]:
        """A function that tokenizes part of the texts; to be called in a worker thread.

        Args:
            adapter: which of the model's adapters they are to be run with.

        Raises:
            InvalidInput: the request's limit leaves no room for any text.
        """
        instruction: list[int] = []
        limited = truncation.max_tokens is not None or truncation.side is Side.LEFT
        if prompt and (self._format.unpooled != "nothing" or limited):
            [instruction] = await self.pool.encode_batch([prompt])
        self._check_room(truncation, len(instruction))
        return partial(self._encode_part, prompt, instruction, truncation, adapter)

    def _check_room(self, truncation: Truncation, prompt: int) -> None:
        """Refuse a limit that the special tokens and the prompt's take up alone."""
        needed = self.special_tokens + prompt
        if truncation.max_tokens is None or truncation.max_tokens > needed:
            return
        beside = f"the model's {self.special_tokens} special tokens" + (f" and the prompt's {prompt}" if prompt else "")
        raise InvalidInput(
            f"A limit of {truncation.max_tokens} tokens (`truncate_prompt_tokens`, `max_tokens`) leaves no room for a "
            f"text beside {beside}; raise it to at least {needed + 1}."
        )

    def _encode_part(
        self,
        prompt: str,
        instruction: list[int],
        truncation: Truncation,
        adapter: int | None,
        texts: Sequence[str],
    ) -> list[Tokenized]:
        unpooled = self._unpooled(instruction) if prompt else 0
        if self.side(truncation) is Side.LEFT:
            # The tokenizer's own cut takes the prompt with it.
            head = len(prompt) if truncation.side else 0
            encoded = self.pool.encode_part_from_end(texts, partial(missing_prompt, prompt), head)
        else:
            encoded = self.pool.encode_part(texts, partial(missing_prompt, prompt))
        cut = self._cut(truncation)
        return [self._finish(ids, cut, unpooled, instruction, adapter=adapter) for ids in encoded]

    def _unpooled(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a row are left out of the pooling, of a prompt with these tokens by itself.

        Both references count from the row's first token, special or not.
        """
        if self._format.unpooled == "nothing":
            return 0
        if self._format.unpooled == "instruction":
            return len(prompt)
        whole = self._finish(prompt, self._cut(NO_LIMIT)).row.token_ids
        return len(whole) - (len(whole) > 0 and int(whole[-1]) in self._special_ids)

    def _cut(self, truncation: Truncation) -> _Cut:
        limit = min(truncation.max_tokens or self._max_model_len, self._max_model_len)
        own = truncation.max_tokens is not None and truncation.max_tokens <= self._max_model_len
        return _Cut(
            limit=limit,
            room=limit - self.special_tokens,
            from_left=self.side(truncation) is Side.LEFT,
            keeps_prompt=truncation.side is not None,
            shortens=own and truncation.allowed is not False,
        )

    def _finish(
        self,
        ids: Sequence[int],
        cut: _Cut,
        unpooled: int = 0,
        instruction: Sequence[int] = (),
        left_out: int = 0,
        adapter: int | None = None,
    ) -> Tokenized:
        """Cut, and put the special tokens around. The instruction's tokens stay when the left side is cut.

        `left_out`: tokens that there are beside the ids, and that do not fit.
        """
        total = len(ids) + left_out + cut.limit - cut.room
        if total > cut.limit:
            if cut.from_left:
                ids = cut_left(ids, cut.room, common_start(ids, instruction) if cut.keeps_prompt else 0)
            else:
                ids = ids[: cut.room if self._format.end_survives_truncation else cut.limit]
        whole = np.array([*self._prefix, *ids, *self._suffix][: cut.limit], dtype=np.int32)
        shortened = cut.shortens and total > cut.limit
        row = Row(whole, unpooled=unpooled, adapter=adapter)
        return Tokenized(row, len(whole) if shortened else total, shortened)

    def check(
        self,
        inputs: Sequence[Sequence[int]],
        param: str,
        truncation: Truncation = NO_LIMIT,
        adapter: int | None = None,
    ) -> list[Tokenized]:
        """Take token ids of this model's vocabulary as they are; special tokens are added where they are missing.

        Args:
            adapter: as of `encoder`.

        Raises:
            InvalidInput: an id is outside the vocabulary, a list is empty, or the request's limit leaves no room.
        """
        self._check_room(truncation, 0)
        cut = self._cut(truncation)
        return [self._check_one(ids, cut, f"{param}[{index}]", adapter) for index, ids in enumerate(inputs)]

    def _check_one(self, ids: Sequence[int], cut: _Cut, param: str, adapter: int | None) -> Tokenized:
        advice = (
            ": ids must come from this model's own tokenizer. Send text instead (with LangChain: "
            "check_embedding_ctx_length=False)."
        )
        check_ids(ids, self._vocab_size, param, advice)
        start, stop = 0, len(ids)
        if self._prefix and list(ids[: len(self._prefix)]) == self._prefix:
            start = len(self._prefix)
        if self._suffix and list(ids[max(start, stop - len(self._suffix)) :]) == self._suffix:
            stop -= len(self._suffix)
        # No copy of what does not fit: there may be millions.
        if cut.from_left:
            kept = ids[max(start, stop - self._max_model_len) : stop]
        else:
            kept = ids[start : min(stop, start + self._max_model_len)]
        return self._finish(kept, cut, left_out=stop - start - len(kept), adapter=adapter)


def common_start(ids: Sequence[int], instruction: Sequence[int]) -> int:
    """How many tokens the row and the instruction have in common at the start.

    That may be one less than all of the instruction: its last characters can share a token with the text's first.
    """
    pairs = zip(ids, instruction, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(ids), len(instruction)))


def cut_left(ids: Sequence[int], room: int, instruction: int) -> Sequence[int]:
    """The first `instruction` tokens, and as many of the last as there is room for."""
    if len(ids) <= room or instruction >= room:
        return ids[:room]
    return [*ids[:instruction], *ids[instruction - room :]]


# sentence-transformers' encode_query and encode_document look for these names, in this order.
QUERY_NAMES = ("query",)
DOCUMENT_NAMES = ("document", "passage", "corpus")


def choose_prompt(card: ModelCard, choice: PromptChoice) -> str:
    """The instruction, else the prompt by name, else by role, else the model's default prompt, if it has one.

    As sentence-transformers has it: a role without a prompt is no prompt, and not the default one.

    Raises:
        InvalidInput: the model has no prompt of that name, or no adapter for the task.
    """
    if choice.instruction is not None:
        return _instructed(card, choice.instruction)
    if choice.prompt_name is not None:
        return _named(card, choice.prompt_name)
    if (task := _task(card, choice)) is not None:
        return card.prompts.get(task, "")
    if choice.task is not None:
        return card.prompts.get(choice.task, "")
    if choice.is_query is None:
        return _default(card)
    return _first(card, QUERY_NAMES if choice.is_query else DOCUMENT_NAMES)


def _instructed(card: ModelCard, instruction: str) -> str:
    """In the model's own template; as it is where there is none, or where it is written out already."""
    if card.instruction_template is None or not instruction or instruction.startswith("Instruct: "):
        return instruction
    return card.instruction_template.replace(INSTRUCTION_PLACE, instruction)


def named_prompts(card: ModelCard) -> dict[str, str]:
    """What `prompt_name` may be, and the text that then goes before each input.

    An embedding model has `query` and `document`, empty or not, as every sentence-transformers model has.
    """
    always = (QUERY_NAMES[0], DOCUMENT_NAMES[0]) if card.task is Task.EMBED else ()
    return {**{name: _named(card, name) for name in always}, **card.prompts}


def _named(card: ModelCard, name: str) -> str:
    if name in card.prompts:
        return card.prompts[name]
    if name in QUERY_NAMES or name in DOCUMENT_NAMES:  # every sentence-transformers model has these, empty or not
        return _first(card, QUERY_NAMES if name in QUERY_NAMES else DOCUMENT_NAMES)
    known = ", ".join(sorted(named_prompts(card)))
    raise InvalidInput(
        f"`prompt_name` {name[:100]!r} is not a prompt of {card.id}; these are: {known}.", param="prompt_name"
    )


def _default(card: ModelCard) -> str:
    if card.task is Task.RERANK or card.default_prompt_name is None:  # a reranker's is its instruction
        return ""
    return card.prompts.get(card.default_prompt_name, "")


def _first(card: ModelCard, names: tuple[str, ...]) -> str:
    return next((card.prompts[name] for name in names if name in card.prompts), "")


# What other dialects, and roles, call the tasks of jina-embeddings-v3.
TASKS = {
    **dict.fromkeys((*QUERY_NAMES, "search_query"), "retrieval.query"),
    **dict.fromkeys((*DOCUMENT_NAMES, "search_document"), "retrieval.passage"),
    "clustering": "separation",
}


def choose_adapter(card: ModelCard, choice: PromptChoice) -> int | None:
    """The adapter of the task that the texts are for, as an index in the card's; None: the weights without any.

    A prompt by its name has the adapter of the task of that name. Where nothing is said, there is none, whatever the
    default prompt is: so the reference has it.

    Raises:
        InvalidInput: the model has adapters, and none for that task.
    """
    task = _task(card, choice)
    return None if task is None else card.adapters.index(task)


def _task(card: ModelCard, choice: PromptChoice) -> str | None:
    """The name of one of the model's adapters. Raises InvalidInput as `choose_adapter`."""
    if not card.adapters:
        return None
    role = {True: QUERY_NAMES[0], False: DOCUMENT_NAMES[0], None: ""}[choice.is_query]
    word = choice.prompt_name or choice.use or choice.task or role
    task = TASKS.get(word, word)
    if task in card.adapters:
        return task
    if choice.use is not None and choice.prompt_name is None:
        raise InvalidInput(
            f"`task` {word!r} is not a task of {card.id}; these are: {', '.join(card.adapters)}.", param="task"
        )
    return None


def asks_for_query(choice: PromptChoice) -> bool:
    """Whether the texts are queries, by whichever field says so."""
    named = f"{choice.prompt_name or ''} {choice.task or ''}".lower()
    return bool(choice.is_query) or "query" in named
