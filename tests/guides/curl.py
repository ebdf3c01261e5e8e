"""What a `curl` command would ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

# https://curl.se/docs/manpage.html
VALUED = {"-H", "-d", "-X", "-F", "-o", "--data", "--header", "--request", "--form", "--output"}
PLAIN = {"-s", "-S", "-f", "-i", "-N", "--fail", "--silent", "--show-error", "--no-buffer", "--include"}


@dataclass(frozen=True)
class Request:
    """Method, address, and what is sent."""

    method: str
    url: SplitResult
    headers: tuple[str, ...]
    data: str | None
    form: tuple[str, ...]

    @property
    def origin(self) -> str:
        """Scheme and host, as they are written."""
        return f"{self.url.scheme}://{self.url.netloc}"


def request(words: Sequence[str]) -> Request:
    """The request of the words after `curl`. Raises ValueError with what is wrong."""
    values: dict[str, list[str]] = {}
    addresses = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in VALUED:
            if not rest:
                raise ValueError(f"{word} has no value")
            values.setdefault(word, []).append(rest.pop(0))
        elif re.match(r"https?://", word):
            addresses.append(word)
        elif word not in PLAIN and not _cluster(word):
            raise ValueError(f"{word!r} is neither an address nor a flag that is known here")
    if len(addresses) != 1:
        raise ValueError(f"{len(addresses)} addresses")
    data, form = (tuple(_of(values, *flags)) for flags in (("-d", "--data"), ("-F", "--form")))
    method = (_of(values, "-X", "--request") or ["POST" if data or form else "GET"])[-1]
    headers = tuple(_of(values, "-H", "--header"))
    return Request(method, urlsplit(addresses[0]), headers, "&".join(data) if data else None, form)


def _cluster(word: str) -> bool:
    return re.fullmatch(r"-[A-Za-z]{2,}", word) is not None and all(f"-{letter}" in PLAIN for letter in word[1:])


def _of(values: dict[str, list[str]], *flags: str) -> list[str]:
    return [value for flag in flags for value in values.get(flag, ())]
