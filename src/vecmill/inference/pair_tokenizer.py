"""A query and its documents to rows for a reranker.

A cross-encoder's rows are `[CLS] query [SEP] document [SEP]`. A decoder's prompt is cut into parts that are tokenized
one by one and give the same tokens as the whole, so that what precedes the documents is tokenized and computed once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from string import punctuation
from typing import Protocol

import numpy as np

from vecmill.core.errors import InputTooLong, InvalidInput, StartupError
from vecmill.core.types import Prefix, Row, Side, TokenIds
from vecmill.inference.text_tokenizer import Tokenized
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.chat_template import PairPrompt, Pieces, Slot, UnfitTemplateError, filled, sections


@dataclass(frozen=True, slots=True)
class PairLimits:
    """What a request wants cut from queries and documents, in tokens without special tokens."""

    side: Side | None = None
    """Of documents; a query is then cut at its end. None: of both what the tokenizer cuts."""
    query: int | None = None
    document: int | None = None
    pair: int | None = None
    """Of both together, all tokens around them included."""
    refuse: bool = False
    """What is longer than `pair` is an error."""
    query_side: Side = Side.RIGHT

    def cut_query(self, ids: list[int]) -> list[int]:
        """The query's tokens that stay."""
        return keep(ids, self.query, self.query_side)

    def cut_document(self, ids: list[int]) -> list[int]:
        """The document's tokens that stay."""
        return keep(ids, self.document, self.side)

    def room(self, max_model_len: int) -> int:
        """Tokens of a row."""
        return min(self.pair or max_model_len, max_model_len)


NO_LIMITS = PairLimits()


def keep(ids: list[int], limit: int | None, side: Side | None) -> list[int]:
    """So many tokens, the `side` cut off."""
    if limit is None or len(ids) <= limit:
        return ids
    return ids[len(ids) - limit :] if side is Side.LEFT else ids[:limit]


class PairTokenizer(Protocol):
    """One reranker's tokenizer."""

    pool: TokenizerPool

    async def encode(
        self, query: str, documents: Sequence[str], instruction: str | None, limits: PairLimits = NO_LIMITS
    ) -> list[Tokenized]:
        """One row for each document, in order.

        Raises:
            InvalidInput: the model takes no instruction, or the limits leave no room.
        """
        ...


class CrossEncoderTokenizer:
    """`[CLS] query [SEP] document [SEP]`, as the tokenizer's own template for pairs has it."""

    def __init__(self, pool: TokenizerPool, max_model_len: int, prompt: str = "", padding: int | None = None) -> None:
        """`prompt` goes before every query. `padding`: a token that the head does not look at where it ends a row."""
        self.pool = pool
        self._prompt = prompt
        self._padding = padding
        self._max_model_len = max_model_len
        template = pool.around_pair
        self._before, self._between, self._after = template.before, template.between, template.after
        self._second_type = template.second_type
        self._around = len(template)

    async def encode(
        self, query: str, documents: Sequence[str], instruction: str | None, limits: PairLimits = NO_LIMITS
    ) -> list[Tokenized]:
        """See `PairTokenizer`."""
        if instruction:
            raise InvalidInput(
                "`instruction`: this reranker was trained without instructions; leave it out.", param="instruction"
            )
        if limits.room(self._max_model_len) < self._around + 2:
            raise InvalidInput(
                f"A limit of {limits.pair} tokens (`truncate_prompt_tokens`) leaves no room for a query and a document "
                f"beside the model's {self._around} special tokens; raise it to at least {self._around + 2}."
            )
        limits = replace(limits, side=limits.side or self.pool.truncation_side, query_side=self._query_side(limits))
        encode = partial(encode_documents, self.pool, side=limits.query_side)
        [whole] = await self.pool.map(encode, [self._prompt + query])
        first = limits.cut_query(whole)
        return await self.pool.map(partial(self._encode_part, first, len(first) < len(whole), limits), documents)

    def _query_side(self, limits: PairLimits) -> Side:
        return self.pool.truncation_side if limits.side is None else Side.RIGHT

    def _encode_part(
        self, first: list[int], shortened: bool, limits: PairLimits, documents: Sequence[str]
    ) -> list[Tokenized]:
        return [
            self._pair(first, second, limits, shortened)
            for second in encode_documents(self.pool, documents, limits.side)
        ]

    def _pair(self, first: list[int], document: list[int], limits: PairLimits, shortened: bool) -> Tokenized:
        second = limits.cut_document(document)
        total = len(first) + len(second) + self._around
        keep_first, keep_second = longest_first(
            len(first), len(second), limits.room(self._max_model_len) - self._around
        )
        head = [*self._before, *keep(first, keep_first, limits.query_side), *self._between]
        ids = np.array([*head, *keep(second, keep_second, limits.side), *self._after], dtype=np.int32)
        row = Row(without_padding(ids, self._padding), second_text=len(head) if self._second_type else None)
        total -= len(ids) - len(row)
        shortened = shortened or len(second) < len(document)
        return tokenized(row, total, limits, self._max_model_len, shortened)


def encode_documents(pool: TokenizerPool, texts: Sequence[str], side: Side | None, before: str = "") -> list[list[int]]:
    """The tokens of each, with what goes before it; of a long one those at the end that stays."""
    encode = pool.encode_part_from_end if side is Side.LEFT else pool.encode_part
    return encode(texts, lambda text: before)


def tokenized(row: Row, total: int, limits: PairLimits, max_model_len: int, shortened: bool) -> Tokenized:
    """If the request set this limit and allows truncation, report the row as shortened rather than too long."""
    own = limits.pair is not None and limits.pair <= max_model_len and not limits.refuse
    if own and total > len(row):
        return Tokenized(row, len(row), shortened=True)
    return Tokenized(row, total, shortened)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text are kept: the longer is cut first (the tokenizers library's rule)."""
    if first + second <= room:
        return first, second
    shorter, longer = min(first, second), max(first, second)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


class InstructTokenizer:
    """A decoder's prompt around a pair. All before the documents is tokenized once, and in a causal model computed once
    too, as their rows' prefix."""

    def __init__(
        self,
        pool: TokenizerPool,
        control: TokenizerPool,
        max_model_len: int,
        prompt: PairPrompt,
        default_instruction: str | None = None,
        padding: int | None = None,
        *,
        shares_prefix: bool = True,
    ) -> None:
        """`pool` tokenizes what users send, `control` the words around it. `padding` as in `CrossEncoderTokenizer`.

        Args:
            shares_prefix: whether no token looks at those after it.

        Raises:
            StartupError: the prompt leaves no room.
            UnfitTemplateError: the tokenizer would split it otherwise than in parts.
        """
        self.pool = pool
        self._control = control
        self._max_model_len = max_model_len
        self._padding = padding
        self._shares_prefix = shares_prefix
        self._takes_instruction = prompt.takes_instruction
        self._default_instruction = default_instruction
        self._plain, self._instructed = (lay_out(pieces, pool, control) for pieces in (prompt.plain, prompt.instructed))
        fewest = min(layout.fixed_tokens for layout in (self._plain, self._instructed))
        if max_model_len <= fewest:
            raise StartupError(
                f"MAX_MODEL_LEN={max_model_len} leaves no room beside the reranker's prompt of {fewest} tokens: "
                f"raise it."
            )

    async def encode(
        self, query: str, documents: Sequence[str], instruction: str | None, limits: PairLimits = NO_LIMITS
    ) -> list[Tokenized]:
        """See `PairTokenizer`.

        Raises:
            InputTooLong: instruction and query leave no room for a document.
            InvalidInput: within the request's own limit they leave none.
        """
        if instruction and not self._takes_instruction:
            raise InvalidInput(
                "`instruction`: this reranker's prompt has no place for one; leave it out.", param="instruction"
            )
        query, shortened = await self._cut_query(query, limits)
        instruction = self._default_instruction if instruction is None else instruction
        layout = self._instructed if instruction else self._plain
        head = await self._head(layout, instruction or "", query)
        most = limits.room(self._max_model_len) - len(layout.tail)
        if most - len(head) < 1:
            self._check_own_limit(limits, len(head) + len(layout.tail))
            raise InputTooLong(
                f"`query` and instruction have {len(head)} tokens with the prompt around them, but the model's maximum "
                f"context length leaves {max(most, 0)} for them and a document; shorten the query.",
                param="query",
            )
        prefix = Prefix(np.array(head, dtype=np.int32)) if head else None
        return await self.pool.map(partial(self._encode_part, layout, prefix, limits, shortened), documents)

    async def _head(self, layout: PairLayout, instruction: str, query: str) -> list[int]:
        users = iter(await self.pool.encode_batch(layout.users_texts(instruction, query)))
        return [token for part in layout.head for token in (next(users) if part.pieces else part.tokens)]

    def _check_own_limit(self, limits: PairLimits, around: int) -> None:
        """Refuse a limit of the request's own where the model's would leave room."""
        if limits.pair is not None and around < self._max_model_len:
            raise InvalidInput(
                f"A limit of {limits.pair} tokens (`truncate_prompt_tokens`) leaves no room for a document beside the "
                f"{around} tokens of prompt, instruction and query; raise it to at least {around + 1}."
            )

    async def _cut_query(self, query: str, limits: PairLimits) -> tuple[str, bool]:
        """The query's beginning, as text: what follows it is tokenized together with it."""
        [ids] = await self.pool.encode_batch([query]) if limits.query is not None else [[]]
        if limits.query is None or len(ids) <= limits.query:
            return query, False
        kept = self.pool.decode(limits.cut_query(ids), skip_special_tokens=False)
        return kept.rstrip("\ufffd"), True  # the first bytes of a character

    def _encode_part(
        self, layout: PairLayout, prefix: Prefix | None, limits: PairLimits, shortened: bool, documents: Sequence[str]
    ) -> list[Tokenized]:
        if layout.behind:
            documents = [document + layout.behind for document in documents]
        wholes = encode_documents(self.pool, documents, limits.side, layout.before)
        return [self._row(layout, prefix, whole, limits, shortened) for whole in wholes]

    def _row(
        self, layout: PairLayout, prefix: Prefix | None, whole: list[int], limits: PairLimits, shortened: bool
    ) -> Tokenized:
        """One document's row. If it is too long the document is cut, never the prompt's words after it."""
        document, tail = limits.cut_document(whole), layout.tail
        room = limits.room(self._max_model_len) - (len(prefix) if prefix else 0)
        total = len(document) + len(tail)
        cut = len(document) < len(whole)
        if (cut or total > room) and limits.side is not Side.LEFT and layout.restored != tail:
            document, tail = [*document, *(() if cut else tail)], layout.restored[-room:]
        ids = np.array([*keep(document, max(room - len(tail), 0), limits.side), *tail], dtype=np.int32)
        row = self._behind(prefix, ids)
        left_out = len(ids) + (len(prefix) if prefix else 0) - len(row)
        total += (len(prefix) if prefix else 0) - left_out
        return tokenized(row, total, limits, self._max_model_len, shortened or cut)

    def _behind(self, prefix: Prefix | None, ids: TokenIds) -> Row:
        """The row of the shared tokens and `ids`; without a shared prefix if `ids` has nothing but padding tokens."""
        if prefix is not None and not self._shares_prefix:
            return Row(np.concatenate((prefix.token_ids, ids)))
        own = without_padding(ids, self._padding)
        if prefix is None or (len(own) and own[-1] != self._padding):
            return Row(own, prefix=prefix)
        return Row(without_padding(np.concatenate((prefix.token_ids, ids)), self._padding))


def without_padding(ids: TokenIds, padding: int | None) -> TokenIds:
    """A row without the padding tokens that it ends with: in a causal model nothing before them sees them."""
    if padding is None or not len(ids) or ids[-1] != padding:
        return ids
    others = np.flatnonzero(ids != padding)
    return ids[: int(others[-1]) + 1 if len(others) else 1]


# Beginnings of texts, of every kind of character: where a tokenizer splits depends on what follows.
PROBES = (
    *(
        "x",
        "a word",
        "",
        " x",
        "  x",
        "\nx",
        "\n\n x",
        "\t",
        "\r\n",
        "7",
        "77 8",
        "...",
        "?!",
        "'s",
        "<x>",
        ">>",
        ": x",
    ),
    *("é", "ü 1", "\u0301x", "你好", "。", "дела", "😀", "▁x", "\u00a0x", "\u200bx", *punctuation),
)
PROBE_INSTRUCTION = "Find it"


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Either fixed text, whose control tokens are meant, or a stretch with users' text, whose are not."""

    tokens: tuple[int, ...] = ()
    pieces: Pieces = ()


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Where the text around a pair is cut."""

    head: tuple[PromptPart, ...]
    """Before the document."""
    before: str
    """Fixed text that is tokenized together with the document, which it may be one token with."""
    behind: str
    """What follows the document until a control token, or the end; tokenized with it too."""
    tail: tuple[int, ...]
    """The tokens after that."""
    restored: tuple[int, ...]
    """Those that end a row whose document was cut; sentence-transformers restores as many."""

    @property
    def fixed_tokens(self) -> int:
        """What there is without any text."""
        return sum(len(part.tokens) for part in self.head) + len(self.tail)

    def users_texts(self, instruction: str, query: str) -> list[str]:
        """The stretches of the head, in order."""
        return [filled(part.pieces, instruction, query, "") for part in self.head if part.pieces]


def lay_out(pieces: Pieces, pool: TokenizerPool, control: TokenizerPool) -> PairLayout:
    """Cut a prompt. `pool` tokenizes what users send, `control` what has control tokens.

    Raises:
        UnfitTemplateError: the tokenizer gives the whole other tokens than the parts.
    """
    separators = _separators(control)
    stretches = [stretch for part in sections(pieces) for stretch in _stretches(part, separators)]
    at = next(index for index, (users, part) in enumerate(stretches) if users and Slot.DOCUMENT in part)
    run = stretches[at][1]
    document = run.index(Slot.DOCUMENT)
    before = "".join(map(str, run[document - 1 : document])) if document else ""
    behind = "".join(map(str, run[document + 1 :]))
    shared, own = _cut(run[: max(0, document - 1)], before, behind, Boundaries(pool))
    head = [PromptPart(pieces=part) if users else PromptPart(_fixed(part, control)) for users, part in stretches[:at]]
    tail = tuple(token for _, part in stretches[at + 1 :] for token in _fixed(part, control))
    layout = PairLayout(
        head=(*head, PromptPart(pieces=shared)) if shared else (*head,),
        before=own,
        behind=behind,
        tail=tail,
        restored=_restored(pieces, control) or tail,
    )
    _check(pieces, layout, control)
    return layout


def _separators(control: TokenizerPool) -> re.Pattern[str] | None:
    """The added tokens, at which every tokenizer splits; None: there are none.

    One that is a part of another is not among them: Gemma has one for each number of line breaks, and a query may end
    with some.
    """
    contents = {token.content for token in control.tokenizer.get_added_tokens_decoder().values()} - {""}
    parts = {part for part in contents if part.isspace() and any(part in other for other in contents - {part})}
    longest_first = sorted(contents - parts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _stretches(pieces: Pieces, added: re.Pattern[str] | None) -> Iterator[tuple[bool, Pieces]]:
    """A part of the prompt cut at added tokens; whether users' text is in each stretch."""
    runs: list[list[str | Slot]] = [[]]
    for piece in pieces:
        if isinstance(piece, Slot) or added is None:
            runs[-1].append(piece)
            continue
        for index, text in enumerate(added.split(piece)):
            if index % 2:
                runs += [[text], []]
            elif text:
                runs[-1].append(text)
    for users, several in groupby(filter(None, runs), key=lambda run: any(isinstance(part, Slot) for part in run)):
        for run in several if users else [chain.from_iterable(several)]:
            yield users, tuple(run)


def _fixed(part: Pieces, control: TokenizerPool) -> tuple[int, ...]:
    return tuple(control.encode("".join(map(str, part))))


def _cut(rest: Pieces, before: str, behind: str, boundaries: Boundaries) -> tuple[Pieces, str]:
    """Divide the text before the document into a shared part and the text that is tokenized with the document.

    The cut is the last place at which the tokenizer splits whatever the document begins with.
    """
    for cut in range(len(before), -1, -1):
        left, right = before[:cut], before[cut:]
        if not left and rest:
            break
        if all(boundaries.split(rest, left, f"{right}{probe}{behind}", probe) for probe in PROBES):
            return ((*rest, left) if left else ()), right
    raise UnfitTemplateError("is not split between the query and the document by its tokenizer")


class Boundaries:
    """Where a tokenizer splits a text whatever stands on either side."""

    def __init__(self, pool: TokenizerPool) -> None:
        self._pool = pool
        self._crossed: dict[str, bool] = {}

    def split(self, rest: Pieces, left: str, second: str, probe: str) -> bool:
        """Whether the tokenizer splits between the left and the right text, so that no token spans both.

        Two checks: the two tokenized apart give the tokens of the whole, and a word boundary lies between them; or,
        where the tokenizer has no words (Gemma), no token of the vocabulary has the two characters beside each other.
        """
        pool = self._pool
        first = filled(rest, PROBE_INSTRUCTION, probe, "") + left
        if [*pool.encode(first), *pool.encode(second)] != pool.encode(first + second):
            return False
        tokenizer = pool.tokenizer
        if tokenizer.normalizer is not None:
            first, second = map(tokenizer.normalizer.normalize_str, (first, second))
        if not first or not second:
            return True
        words = [(first + second, (0, len(first + second)))]
        if tokenizer.pre_tokenizer is not None:
            words = tokenizer.pre_tokenizer.pre_tokenize_str(first + second)
        if not any(start < len(first) < stop for _, (start, stop) in words):
            return True
        as_written = "".join(word for word, _ in words) == first + second
        return as_written and not self._is_crossed(first[-1] + second[0])

    def _is_crossed(self, characters: str) -> bool:
        """Whether a token has two characters beside each other."""
        if characters not in self._crossed:
            vocabulary = self._pool.tokenizer.get_vocab(with_added_tokens=True)
            self._crossed[characters] = any(characters in piece for piece in vocabulary)
        return self._crossed[characters]


def _restored(pieces: Pieces, control: TokenizerPool) -> tuple[int, ...]:
    """The tokens that two pairs of different texts end with (sentence-transformers' rule and texts)."""
    first, second = (_whole(pieces, text, control) for text in ("0", "1 2 3 4"))
    most = min(len(first), len(second))
    same = next((index for index in range(most) if first[-1 - index] != second[-1 - index]), most)
    return tuple(first[len(first) - same :]) if 0 < same < most else ()


def _check(pieces: Pieces, layout: PairLayout, control: TokenizerPool) -> None:
    for probe in PROBES:
        texts = iter(layout.users_texts(PROBE_INSTRUCTION, probe))
        joined = [
            token for part in layout.head for token in (control.encode(next(texts)) if part.pieces else part.tokens)
        ]
        joined += [*control.encode(f"{layout.before}{probe}{layout.behind}"), *layout.tail]
        if joined != _whole(pieces, probe, control):
            raise UnfitTemplateError("is not split at its control tokens by its tokenizer")


def _whole(pieces: Pieces, text: str, control: TokenizerPool) -> list[int]:
    """The tokens of a pair of which both are this text."""
    parts = (filled(part, PROBE_INSTRUCTION, text, text) for part in sections(pieces))
    return [token for part in parts for token in control.encode(part)]
