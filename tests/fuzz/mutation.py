"""Changes of an input that are more telling than random bytes: by the input's own parts, and words of its format."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

MOST_CHANGES = 4
LONGEST = 65_536  # bytes
NUMBERS = (0, -1, 1, 2, 7, 64, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308)
TEXTS = ("", "a", "\0", "\ud83d", "😀", "../..", "/etc/passwd", "null", "[MASK]", "x" * 300, "é" * 40, "\u202e", "\n")
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": None}, [{}], float("nan"), float("inf"))
INTERESTING = (b"", b"\0", b"\n", b"\r\n", b"\r", b" ", b"\t", b"\xff", b"\xef\xbb\xbf", b"{", b"[", b'"', b"\\", b",")


def mutated(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    """A changed copy: as JSON where it is some, or as bytes."""
    if source.random() < 0.5 and (value := _parsed(data)) is not _NO_JSON:
        for _ in range(source.randint(1, MOST_CHANGES)):
            value = _changed(value, source)
        changed = json.dumps(value, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")
        if source.random() < 0.8:
            return changed[:LONGEST]
        data = changed
    for _ in range(source.randint(1, MOST_CHANGES)):
        data = source.choice(BYTE_CHANGES)(data, words, source)
    return data[:LONGEST]


_NO_JSON = object()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return _NO_JSON


def _changed(value: Any, source: random.Random) -> Any:
    """One place of it is another: deeper where there is something in it."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or source.random() < 0.1:
        return _other(value, source)
    key, copy = source.choice(inner), value.copy()
    match source.randrange(8):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[_text(source)] = copy.pop(key)
        case 1:
            copy.insert(key, copy[key])
        case 2:
            copy[key] = copy[source.choice(inner)]
        case _:
            copy[key] = _changed(copy[key], source)
    return copy


def _other(value: Any, source: random.Random) -> Any:
    match source.randrange(6):
        case 0:
            return source.choice(VALUES)
        case 1:
            return source.choice(NUMBERS)
        case 2:
            return _text(source)
        case 3 if isinstance(value, int | float):
            return value + source.choice((-1, 1))
        case 3 if isinstance(value, str):
            return value[: source.randint(0, len(value))] + _text(source)
        case 4:
            return [value, value]
        case 5:
            return {_text(source): value}
    return source.choice(NUMBERS)


def _text(source: random.Random) -> str:
    return source.choice(TEXTS) if source.random() < 0.7 else chr(source.randrange(0x11_0000))


Change = Callable[[bytes, Sequence[bytes], random.Random], bytes]


def _insert(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    place = source.randint(0, len(data))
    return data[:place] + source.choice((*words, *INTERESTING, bytes([source.randrange(256)]))) + data[place:]


def _replace(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    place, word = source.randint(0, len(data)), source.choice((*words, *INTERESTING))
    return data[:place] + word + data[place + len(word) :]


def _drop(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    place = source.randint(0, len(data))
    return data[:place] + data[place + source.choice((1, 1, 2, 4, 16, 256)) :]


def _flip(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    if not data:
        return data
    place = source.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << source.randrange(8))]) + data[place + 1 :]


def _repeat(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    start = source.randint(0, len(data))
    stop = start + source.choice((1, 2, 8, 64))
    return data[:start] + data[start:stop] * source.choice((2, 3, 20)) + data[stop:]


def _splice(data: bytes, words: Sequence[bytes], source: random.Random) -> bytes:
    places = sorted(source.randint(0, len(data)) for _ in range(3))
    return data[: places[0]] + data[places[1] : places[2]] + data[places[0] :]


BYTE_CHANGES: tuple[Change, ...] = (_insert, _replace, _drop, _flip, _repeat, _splice)
