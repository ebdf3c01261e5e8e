"""JSON that strangers send: bounded before it is parsed, parsed in pieces, and named where it is wrong.

A body of long strings parses fast and stays small; one of as many bytes in small values takes seconds, and thirty times
its size. orjson holds the interpreter meanwhile, so no thread keeps the event loop free of it. Hence the values are
counted first, without looking into strings, and what is large is parsed a megabyte at a time.

Source: https://datatracker.ietf.org/doc/html/rfc8259
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from vecmill.core.errors import BodyTooLarge, InvalidInput, MalformedBody, VecmillError

PIECE = 1_048_576  # bytes
# As many levels of lists and objects are taken apart where they are larger than a piece.
DEEPEST_SPLIT = 16
LEVELS_NAMED = 6
LONGEST_KEY_NAMED = 60  # characters
LONGEST_KEY_READ = 4 * LONGEST_KEY_NAMED  # bytes

QUOTE, COMMA, COLON, OPEN, CLOSE = range(1, 6)
KINDS = bytes(
    {34: QUOTE, 44: COMMA, 58: COLON, 91: OPEN, 123: OPEN, 93: CLOSE, 125: CLOSE}.get(i, 0) for i in range(256)
)
CLOSED_BY = {b"[": b"]", b"{": b"}", b'"': b'"'}
SPACE_AT_A_TIME = 65_536  # bytes
LONGEST_CHARACTER = 4  # bytes in UTF-8
SPACE = b" \t\r\n"
HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB]")
NOT_JSON = (b"NaN", b"Infinity", b"-Infinity")


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """What one body may hold."""

    values: int = 1_250_000
    """Of every kind. The token ids of 2,048 inputs of 600 tokens are as many."""
    containers: int = 131_072
    """Lists, objects and keys of objects, which take several times the room of other values."""

    @classmethod
    def for_inputs(cls, most: int) -> JsonLimits:
        """For requests with up to `most` inputs, each of which may be an object with a few keys."""
        return cls(max(cls().values, 64 * most), max(cls().containers, 64 * most))


DEFAULT_LIMITS = JsonLimits()


def parse(body: bytes, limits: JsonLimits = DEFAULT_LIMITS, *, piece: int = PIECE) -> Any:
    """The value. To be called in a thread where the body is large; `piece` bytes of it are parsed in one go.

    Raises:
        BodyTooLarge: it holds more than `limits` allow. MalformedBody, InvalidInput: it is not JSON in valid Unicode.
    """
    # The shortest container takes two bytes, so that a small body cannot hold too many.
    if len(body) <= min(piece, 2 * limits.containers):
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise _named(body, error, 0) from None
    return _Pieces(body, _structure(body, limits), piece).value()


@dataclass(frozen=True, slots=True)
class _Structure:
    """What stands outside of strings: commas, colons and brackets, in their order."""

    places: NDArray[np.int32]  # (n,) in bytes
    kinds: NDArray[np.uint8]  # (n,)
    depths: NDArray[np.int32]  # (n,) of what it is in; for a bracket, of what is between it and its partner


def _structure(body: bytes, limits: JsonLimits | None = None) -> _Structure:
    """
    Raises:
        BodyTooLarge: it holds more than the limits allow.
    """
    places: list[NDArray[np.int32]] = []
    kinds: list[NDArray[np.uint8]] = []
    start, in_string, values, containers = 0, 0, 1, 0
    while start < len(body):
        piece = body[start : start + PIECE]
        if start + len(piece) < len(body) and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = piece[:-1]  # what a backslash escapes stays with it
        where, what, in_string = _outside_strings(piece, in_string)
        values += int(np.count_nonzero(what == COMMA))
        containers += int(np.count_nonzero((what == OPEN) | (what == COLON)))
        places.append(where + np.int32(start))
        kinds.append(what)
        start += len(piece)
        if limits is not None and (values > limits.values or containers > limits.containers):
            raise _too_much(body, _joined(places, kinds), limits)
    return _joined(places, kinds)


def _outside_strings(piece: bytes, in_string: int) -> tuple[NDArray[np.int32], NDArray[np.uint8], int]:
    """Where structure is and what it is; 1 at the end if that is within a string, else 0."""
    if b"\\" in piece:
        piece = piece.replace(rb"\\", b"__").replace(rb"\"", b"__")
    kinds = np.frombuffer(piece.translate(KINDS), np.uint8)
    places = np.flatnonzero(kinds).astype(np.int32)
    kinds = kinds[places]
    quotes = kinds == QUOTE
    within = (np.cumsum(quotes, dtype=np.uint8) & 1) ^ np.uint8(in_string)
    outside = (within == 0) & ~quotes
    return places[outside], kinds[outside], int(within[-1]) if len(within) else in_string


def _joined(places: list[NDArray[np.int32]], kinds: list[NDArray[np.uint8]]) -> _Structure:
    every = np.concatenate(kinds) if kinds else np.empty(0, np.uint8)
    closing = every == CLOSE
    steps = (every == OPEN).view(np.int8) - closing.view(np.int8)
    where = np.concatenate(places) if places else np.empty(0, np.int32)
    return _Structure(where, every, np.cumsum(steps, dtype=np.int32) + closing)


def _too_much(body: bytes, structure: _Structure, limits: JsonLimits) -> BodyTooLarge:
    commas = np.flatnonzero(structure.kinds == COMMA)[limits.values - 1 :]
    containers = np.flatnonzero((structure.kinds == OPEN) | (structure.kinds == COLON))[limits.containers :]
    first = min(int(over[0]) for over in (commas, containers) if len(over))
    field = _path(body, structure, int(structure.places[first]) + 1).partition("[")[0]
    what = f"`{field}` makes the request body hold" if field else "The request body holds"
    return BodyTooLarge(
        f"{what} more than {limits.values} values (numbers, texts) or more than {limits.containers} lists, objects and "
        f"keys of objects; split the request.",
        param=field or None,
    )


class _Pieces:
    """Parses a large body piece by piece. Between pieces other threads get the interpreter."""

    def __init__(self, body: bytes, structure: _Structure, piece: int) -> None:
        self._body = body
        self._piece = piece
        self._places, self._kinds, self._depths = structure.places, structure.kinds, structure.depths

    def value(self) -> Any:
        return self._value(0, len(self._body), 0, len(self._places), 1)

    def _value(self, start: int, stop: int, first: int, last: int, depth: int) -> Any:
        """Parse the value in bytes `start` to `stop`, whose structure has the indexes `first` to `last`.

        `depth`: that of the value's own brackets, if it is a container.
        """
        if stop - start <= self._piece:
            return self._loads(start, stop)
        if first == last:
            return self._scalar(start, stop)
        if depth > DEEPEST_SPLIT or not self._is_container(start, stop, first, last, depth):
            return self._loads(start, stop)
        bracket = self._at(first)
        inner = slice(first + 1, last - 1)
        commas = np.flatnonzero((self._kinds[inner] == COMMA) & (self._depths[inner] == depth)) + first + 1
        if last - first == len("[]") and self._is_blank(int(self._places[first]) + 1, int(self._places[last - 1])):
            return [] if bracket == b"[" else {}
        value: Any = [] if bracket == b"[" else {}
        add = value.extend if bracket == b"[" else value.update
        for group in self._groups(first, last - 1, commas):
            add(self._group(bracket, *group, depth))
        return value

    def _is_container(self, start: int, stop: int, first: int, last: int, depth: int) -> bool:
        """Whether there is one list or object, and nothing around it."""
        if self._kinds[first] != OPEN or self._kinds[last - 1] != CLOSE:
            return False
        closings = (self._kinds[first:last] == CLOSE) & (self._depths[first:last] <= depth)
        return (
            bool(self._depths[first] == depth)
            and np.count_nonzero(closings) == 1
            and CLOSED_BY[self._at(first)] == self._at(last - 1)
            and self._is_blank(start, int(self._places[first]))
            and self._is_blank(int(self._places[last - 1]) + 1, stop)
        )

    def _groups(self, first: int, last: int, commas: NDArray[np.intp]) -> Iterator[tuple[int, int, bool]]:
        """Divide the entries of a container into groups of at most a piece each; a larger entry is a group by itself.

        Yields the indexes of the commas or brackets around each group, and whether it has only one entry.
        """
        ends = np.append(commas, last)
        places = self._places[ends]
        before, entry = first, 0
        while entry < len(ends):
            fitting = int(np.searchsorted(places, self._places[before] + self._piece, side="right")) - 1
            end = max(entry, fitting)
            yield before, int(ends[end]), end == entry
            before, entry = int(ends[end]), end + 1

    def _group(self, bracket: bytes, before: int, after: int, is_one: bool, depth: int) -> Any:
        start, stop = int(self._places[before]) + 1, int(self._places[after])
        if not is_one or stop - start <= self._piece or self._is_blank(start, stop):
            return self._entries(bracket, start, stop)
        if bracket == b"[":
            return [self._value(start, stop, before + 1, after, depth + 1)]
        colon = before + 1
        if colon >= after or self._kinds[colon] != COLON:
            return self._entries(bracket, start, stop)
        key_stop = int(self._places[colon])
        key = self._value(start, key_stop, colon, colon, depth)
        if not isinstance(key, str):
            return self._entries(bracket, start, stop)
        return {key: self._value(key_stop + 1, stop, colon + 1, after, depth + 1)}

    def _entries(self, bracket: bytes, start: int, stop: int) -> Any:
        # An empty entry (as after a trailing comma) is an error; within brackets of its own it would be an empty list.
        return self._loads(start, stop, b"" if self._is_blank(start, stop) else bracket)

    def _scalar(self, start: int, stop: int) -> Any:
        """A text, number or name, with white space around it."""
        start, stop = self._after_space(start, stop), self._before_space(start, stop)
        if stop - start <= self._piece:
            return self._loads(start, stop)
        if self._body[start] != ord('"') or self._body[stop - 1] != ord('"'):
            raise MalformedBody(f"The request body is not valid JSON: no value is that long (at byte {start}).")
        parts, place, end = [], start + 1, stop - 1
        while place < end:
            cut = end if end - place <= self._piece else self._cut(place, place + self._piece)
            parts.append(self._loads(place, cut, b'"'))
            place = cut
        return "".join(parts)

    def _cut(self, start: int, stop: int) -> int:
        """The last place of a text up to `stop` where a character, or what stands for one, begins."""
        for place in range(stop - 1, stop - len(r"\uXXXX"), -1):
            if self._begins_escape(start, place):
                length = 6 if self._body[place + 1] == ord("u") else 2
                stop = place if place + length > stop else stop
                break
        before = stop - len(r"\uXXXX")
        if HIGH_SURROGATE.match(self._body, before) and self._begins_escape(start, before):
            stop = before
        for _ in range(LONGEST_CHARACTER - 1):
            stop -= self._body[stop] & 0xC0 == 0x80  # within a character of several bytes
        return stop

    def _begins_escape(self, start: int, place: int) -> bool:
        """Whether a backslash is not itself escaped."""
        if self._body[place] != ord("\\"):
            return False
        before = self._body[start : place + 1]
        return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1

    def _is_blank(self, start: int, stop: int) -> bool:
        return self._after_space(start, stop) == stop

    def _after_space(self, start: int, stop: int) -> int:
        """A little at a time: there may be megabytes of it."""
        while start < stop:
            part = self._body[start : min(stop, start + SPACE_AT_A_TIME)]
            rest = len(part.lstrip(SPACE))
            start += len(part) - rest
            if rest:
                break
        return start

    def _before_space(self, start: int, stop: int) -> int:
        while start < stop:
            part = self._body[max(start, stop - SPACE_AT_A_TIME) : stop]
            rest = len(part.rstrip(SPACE))
            stop -= len(part) - rest
            if rest:
                break
        return stop

    def _loads(self, start: int, stop: int, bracket: bytes = b"") -> Any:
        text: Any = memoryview(self._body)[start:stop]
        if bracket:
            text = b"".join((bracket, text, CLOSED_BY[bracket]))
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise _named(self._body, error, start - len(bracket)) from None

    def _at(self, index: int) -> bytes:
        place = int(self._places[index])
        return self._body[place : place + 1]


def _named(body: bytes, error: orjson.JSONDecodeError, start: int) -> VecmillError:
    """What is wrong with the part of a body that begins at `start`, and where."""
    place = start + len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))
    if error.msg.endswith("surrogate in string"):
        field = _path(body, _structure(body[:place]), place)
        return InvalidInput(
            f"`{field or 'a key'}` has half of a surrogate pair, which is no character: cut texts between characters, "
            f"not between UTF-16 units.",
            param=field or None,
        )
    problem = f"The request body is not valid JSON: {error.msg} (at byte {place})."
    if body[place : place + 9].startswith(NOT_JSON) or body[max(0, place - 1) : place + 8].startswith(NOT_JSON):
        problem += " NaN and Infinity are not JSON."
    return MalformedBody(problem)


def _path(body: bytes, structure: _Structure, place: int) -> str:
    """The value at a place of the body, as `documents[3].text`: the first levels of it, and none that is a key."""
    count = int(np.searchsorted(structure.places, place))
    kinds, depths = structure.kinds[:count], structure.depths[:count]
    path = ""
    for depth in range(1, LEVELS_NAMED + 1):
        level = np.flatnonzero(depths == depth)
        brackets = level[kinds[level] >= OPEN]
        if not len(brackets) or kinds[brackets[-1]] == CLOSE:
            break
        inside = level[level > brackets[-1]]
        if body[structure.places[brackets[-1]]] == ord("["):
            path += f"[{np.count_nonzero(kinds[inside] == COMMA)}]"
        elif len(inside) and kinds[inside[-1]] == COLON:
            before = inside[-2] if len(inside) > 1 else brackets[-1]
            path += f".{_key(body, int(structure.places[before]) + 1, int(structure.places[inside[-1]]))}"
        else:
            break
    return path.lstrip(".")


def _key(body: bytes, start: int, stop: int) -> str:
    raw = body[start : min(stop, start + LONGEST_KEY_READ)].strip(SPACE + b'"')
    shown = raw.decode("utf-8", "replace")[:LONGEST_KEY_NAMED]
    return "".join(each if each.isprintable() else "\ufffd" for each in shown)  # control characters are for terminals
