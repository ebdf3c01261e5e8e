"""A reranker's prompt in parts that are tokenized by themselves, with the same tokens as the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby

from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.chat_template import Pieces, Slot, UnfitTemplateError, filled

# Texts that show where a tokenizer always splits: the first character may be one token with what is before it.
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
        ".",
        "...",
        ")",
        "?!",
        "'s",
        "'",
        '"',
    ),
    *(
        "#x",
        "/",
        ">",
        ">>",
        "<",
        "<x>",
        "=",
        ":",
        ": x",
        "_",
        "-",
        "é",
        "ü 1",
        "\u0301x",
        "你好",
        "。",
        "дела",
        "😀",
        "▁x",
    ),
)
INSTRUCTION = "Find it"


@dataclass(frozen=True, slots=True)
class Part:
    """Either fixed text, whose control tokens are meant, or a stretch with users' text, whose are not."""

    tokens: tuple[int, ...] = ()
    pieces: Pieces = ()


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Where the text around a pair is cut."""

    head: tuple[Part, ...]
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
    stretches = list(_stretches(pieces, control))
    at = next(index for index, (users, part) in enumerate(stretches) if users and Slot.DOCUMENT in part)
    run = stretches[at][1]
    document = run.index(Slot.DOCUMENT)
    before = "".join(map(str, run[document - 1 : document])) if document else ""
    behind = "".join(map(str, run[document + 1 :]))
    shared, own = _cut(run[: max(0, document - 1)], before, behind, pool)
    head = [Part(pieces=part) if users else Part(_fixed(part, control)) for users, part in stretches[:at]]
    layout = PairLayout(
        head=(*head, Part(pieces=shared)) if shared else (*head,),
        before=own,
        behind=behind,
        tail=tuple(token for _, part in stretches[at + 1 :] for token in _fixed(part, control)),
        restored=(),
    )
    _check(pieces, layout, control)
    return PairLayout(layout.head, own, behind, layout.tail, _restored(pieces, control) or layout.tail)


def _stretches(pieces: Pieces, control: TokenizerPool) -> Iterator[tuple[bool, Pieces]]:
    """The prompt cut at added tokens, where every tokenizer splits; whether users' text is in each part."""
    contents = [token.content for token in control.copy().get_added_tokens_decoder().values()]
    longest_first = sorted(filter(None, contents), key=len, reverse=True)
    added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
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
    for users, several in groupby(filter(None, runs), key=lambda run: any(isinstance(one, Slot) for one in run)):
        for run in several if users else [chain.from_iterable(several)]:
            yield users, tuple(run)


def _fixed(part: Pieces, control: TokenizerPool) -> tuple[int, ...]:
    return tuple(control.encode("".join(map(str, part))))


def _cut(rest: Pieces, before: str, behind: str, pool: TokenizerPool) -> tuple[Pieces, str]:
    """What of a stretch goes before the document, and the text that is tokenized with it.

    The cut is as late as it can be where the tokenizer splits, whatever the document begins with.
    """
    for cut in range(len(before), -1, -1):
        left, right = before[:cut], before[cut:]
        if not left and rest:
            break
        if all(_splits(rest, left, f"{right}{probe}{behind}", probe, pool) for probe in PROBES):
            return ((*rest, left) if left else ()), right
    raise UnfitTemplateError("is not split between the query and the document by its tokenizer")


def _splits(rest: Pieces, left: str, second: str, probe: str, pool: TokenizerPool) -> bool:
    first = filled(rest, INSTRUCTION, probe, "") + left
    return [*pool.encode(first), *pool.encode(second)] == pool.encode(first + second)


def _restored(pieces: Pieces, control: TokenizerPool) -> tuple[int, ...]:
    """The tokens that two pairs of different texts end with (sentence-transformers' rule and texts)."""
    one, other = (control.encode(filled(pieces, INSTRUCTION, text, text)) for text in ("0", "1 2 3 4"))
    most = min(len(one), len(other))
    same = next((index for index in range(most) if one[-1 - index] != other[-1 - index]), most)
    return tuple(one[len(one) - same :]) if 0 < same < most else ()


def _check(pieces: Pieces, layout: PairLayout, control: TokenizerPool) -> None:
    for probe in PROBES:
        texts = iter(layout.users_texts(INSTRUCTION, probe))
        found = [
            token for part in layout.head for token in (control.encode(next(texts)) if part.pieces else part.tokens)
        ]
        found += [*control.encode(f"{layout.before}{probe}{layout.behind}"), *layout.tail]
        if found != control.encode(filled(pieces, INSTRUCTION, probe, probe)):
            raise UnfitTemplateError("is not split at its control tokens by its tokenizer")
