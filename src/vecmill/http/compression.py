"""Codings of answers: zstd and gzip, by what the client accepts (RFC 9110, section 12.5.3; RFC 8878 for zstd).

Of vectors as JSON, both at their quickest run at about 330 MB/s on a core, and zstd leaves a seventh less. gzip is made
by ISA-L, which is three times as fast as zlib; where it cannot be imported, by zlib.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from enum import StrEnum
from types import ModuleType
from typing import Protocol

import zstandard
from starlette.datastructures import Headers

try:
    from isal import isal_zlib
except ImportError:  # its wheels are for 64-bit x86 and Arm
    gzip_maker: ModuleType = zlib
else:
    gzip_maker = isal_zlib

COMPRESS_FROM_BYTES = 1024
# Digits compress about as well at 1 as at the highest level, in a fraction of the time.
LEVEL = 1
MOST_OFFERS = 64  # of a header that are looked at: 60,000 commas would hold up the event loop
GZIP_WINDOW = 31  # zlib's largest window, with gzip's header and trailer around


class Compressor(Protocol):
    """Compresses piece by piece."""

    def compress(self, data: bytes, /) -> bytes:
        """What can be sent by now."""
        ...

    def flush(self) -> bytes:
        """The rest; the last call."""
        ...


class Coding(StrEnum):
    """As Content-Encoding names it; the first is taken where the client has no preference."""

    ZSTD = "zstd"
    GZIP = "gzip"

    @property
    def headers(self) -> dict[str, str]:
        """Of an answer in this coding."""
        return {"Content-Encoding": self.value, "Vary": "Accept-Encoding"}

    def compressor(self) -> Compressor:
        """A new one."""
        if self is Coding.ZSTD:
            return zstandard.ZstdCompressor(level=LEVEL).compressobj()
        made: Compressor = gzip_maker.compressobj(LEVEL, wbits=GZIP_WINDOW)
        return made

    def compress(self, body: bytes) -> bytes:
        """A whole body."""
        if self is Coding.ZSTD:
            return zstandard.ZstdCompressor(level=LEVEL).compress(body)
        compressed: bytes = gzip_maker.compress(body, LEVEL, GZIP_WINDOW)
        return compressed


def accepted_coding(accept_encoding: str) -> Coding | None:
    """The coding that an Accept-Encoding header likes best; None: the answer is to be sent as it is.

    `*` stands for gzip, which whoever writes that can read.
    """
    qualities = _qualities(accept_encoding)
    best = max(Coding, key=lambda coding: qualities.get(coding, 0.0))  # the first of equal ones
    return best if _is_wanted(best, qualities) else None


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header allows gzip, and does not like an answer as it is better."""
    return _is_wanted(Coding.GZIP, _qualities(accept_encoding))


def _is_wanted(coding: Coding, qualities: Mapping[str, float]) -> bool:
    return 0 < qualities.get(coding, 0.0) >= qualities.get("identity", 0.0)


def field(headers: Headers, name: str) -> str:
    """A header of the Accept kind, whose list may come in several lines (RFC 9110, section 5.3)."""
    return ",".join(headers.getlist(name))


def _qualities(accept_encoding: str) -> dict[str, float]:
    """How much each coding is liked, from 0 to 1."""
    liked: dict[str, float] = {}
    for offer in offers(accept_encoding):
        coding, _, parameters = offer.partition(";")
        liked.setdefault(coding.strip(), quality(parameters.strip().removeprefix("q=") or "1"))
    if "*" in liked:
        liked.setdefault(Coding.GZIP, liked["*"])
    return liked


def offers(header: str) -> list[str]:
    """What a header of the Accept kind lists, in lower case; of a list longer than any client's the beginning."""
    return header.lower().split(",", MOST_OFFERS)[:MOST_OFFERS]


def quality(value: str) -> float:
    """What `q` says in a header, from 0 to 1; 1 where it cannot be read."""
    try:
        number = float(value)
    except ValueError:
        return 1.0
    return number if 0 <= number <= 1 else 1.0
