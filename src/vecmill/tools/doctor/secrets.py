"""What no output repeats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, SecretStr

from vecmill.config import Settings

HIDDEN = "***"
SHORTEST = 4  # characters: what is shorter stands in many words


class Secrets:
    """Those of the settings, and the passwords in their addresses."""

    def __init__(self, settings: Settings) -> None:
        values = set(_values(settings))
        values |= {password for value in values if (password := _password(value))}
        self._values = sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)

    def hidden(self, text: str) -> str:
        """The text without them."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text


def _values(settings: Settings) -> Iterator[str]:
    for field in fields(settings):
        group: BaseModel = getattr(settings, field.name)
        for _, value in group:
            yield from _secrets(value)


def _secrets(value: object) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, tuple):
        for part in value:
            yield from _secrets(part)


def _password(value: str) -> str | None:
    try:
        password = urlsplit(value).password
    except ValueError:
        return None
    return password and unquote(password)
