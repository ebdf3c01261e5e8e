"""What is read of an answer: everything of the first one, of the others only the tokens."""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping
from typing import Any

import orjson

from vecmill.refusals import start_of
from vecmill.tools.bench.errors import BadAnswer
from vecmill.tools.bench.target import Dialect

# `usage` stands before or behind the list, so looking at both ends saves parsing megabytes of numbers.
ENDS_BYTES = 1024
TOKENS = re.compile(rb'"(?:prompt|total)_tokens"\s*:\s*(\d+)')
TOKENS_HEADER = "x-compute-tokens"  # tei has no place for it in the body
FLOAT_BYTES = 4


def tokens_of(content: bytes, headers: Mapping[str, str]) -> int | None:
    """The tokens that the server says it computed; None where it does not say."""
    found = TOKENS.search(content[-ENDS_BYTES:]) or TOKENS.search(content[:ENDS_BYTES])
    if found:
        return int(found[1])
    header = headers.get(TOKENS_HEADER, "")
    return int(header) if header.isdigit() else None


def dimensions_of(content: bytes, dialect: Dialect, texts: int) -> int | None:
    """The size of the vectors; None for scores.

    Raises:
        BadAnswer: it is not one vector or score for each text, or the vectors differ in size.
    """
    try:
        entries = _entries(orjson.loads(content), dialect)
        sizes = {_size(entry) for entry in entries} if dialect is not Dialect.RERANK else set()
    except (ValueError, KeyError, TypeError, Base64Error) as error:
        raise BadAnswer(f"The answer is not one of the dialect {dialect}: {start_of(content)}") from error
    if len(entries) != texts:
        kind = "scores" if dialect is Dialect.RERANK else "vectors"
        raise BadAnswer(f"{texts} texts were sent and {len(entries)} {kind} came back.")
    if dialect is Dialect.RERANK:
        return None
    if len(sizes) != 1 or 0 in sizes:
        raise BadAnswer(f"The vectors that came back have {sorted(sizes)} values; one size above 0 was expected.")
    return sizes.pop()


def _entries(answer: Any, dialect: Dialect) -> list[Any]:
    match dialect:
        case Dialect.OPENAI | Dialect.INFINITY:
            return [entry["embedding"] for entry in answer["data"]]
        case Dialect.TEI:
            return list(answer)
        case Dialect.RERANK:
            return [entry["relevance_score"] for entry in answer["results"]]


def _size(vector: Any) -> int:
    return len(b64decode(vector, validate=True)) // FLOAT_BYTES if isinstance(vector, str) else len(vector)
