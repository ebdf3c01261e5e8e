"""API keys as they are written: in API_KEY, and one a line in API_KEY_FILE; and a fresh one."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import SecretStr

from vecmill.core.errors import StartupError
from vecmill.core.types import NO_LIMITS, KeyLimits, Scope

if TYPE_CHECKING:
    from vecmill.config.groups import AccessSettings

LARGEST = 1_048_576  # bytes; what is more was not meant
SHORTEST_KEY = 16  # characters: what is shorter can be guessed
LONGEST_NAME = 100
KEY = re.compile("[!-~]+")  # ASCII without spaces, as a header takes it
FORM = "must be `key` or `name:key`, the key of ASCII without spaces"
TOO_SHORT = f"has a key of fewer than {SHORTEST_KEY} characters, which can be guessed; `vecmill keys new` makes one"
LIMITS = ("requests", "tokens", "jobs")


class KeyEntry(NamedTuple):
    """One key, and what its holder may do."""

    name: str
    """For the log."""
    key: SecretStr
    is_named: bool = True
    """False: the name is the entry's place, which the next edit may give to another key."""
    scopes: frozenset[Scope] = frozenset({Scope.USE})
    limits: KeyLimits = NO_LIMITS


def key_entry(entry: str, place: str) -> KeyEntry:
    """Read `key` or `name:key`, with options after it: `scopes=use+admin requests=8 tokens=100000 jobs=2`.

    `place` is its name where it has none.

    Raises:
        ValueError: it is no such thing; the message holds no key.
    """
    given, colon, after = entry.partition(":")
    key, *options = (after if colon else entry).split() or [""]
    name = given.strip() if colon else place
    if not name or not KEY.fullmatch(key):
        raise ValueError(FORM)
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"has a name of more than {LONGEST_NAME} characters, or with control characters")
    check_length(key)
    return KeyEntry(name, SecretStr(key), bool(colon), *_options(options))


def check_length(key: str) -> None:
    """Raises ValueError where a key is short enough to be guessed."""
    if len(key) < SHORTEST_KEY:
        raise ValueError(TOO_SHORT)


def check_unique(entries: Sequence[KeyEntry]) -> None:
    """Raises ValueError where a key or a name is there twice."""
    keys = {entry.key.get_secret_value() for entry in entries}
    if len(keys) < len(entries) or len({entry.name for entry in entries}) < len(entries):
        raise ValueError("has a key or a name twice")


def _options(options: Iterable[str]) -> tuple[frozenset[Scope], KeyLimits]:
    scopes, limits = frozenset({Scope.USE}), dict[str, int]()
    for option in options:
        name, _, value = option.partition("=")
        if name == "scopes":
            scopes = _scopes(value)
        elif name in LIMITS and value.isascii() and value.isdecimal() and int(value[:18]) > 0:
            limits[name] = int(value[:18])
        else:
            raise ValueError(
                "has something after a key that is none of `scopes=use`, `scopes=admin`, `scopes=use+admin`, "
                "`requests=N`, `tokens=N`, `jobs=N`"
            )
    return scopes, KeyLimits(**limits)


def _scopes(value: str) -> frozenset[Scope]:
    names = value.replace(",", "+").split("+")
    if not set(names) <= {scope.value for scope in Scope}:
        raise ValueError("has scopes that are not `use`, `admin` or `use+admin`")
    return frozenset(map(Scope, names))


def new_key() -> str:
    """A key that nobody can guess: 43 random characters after `vm-`."""
    return f"vm-{secrets.token_urlsafe(32)}"


def key_line(name: str | None, scopes: str, limits: KeyLimits) -> tuple[str, str]:
    """A fresh key, and the line for API_KEY_FILE that lets it in.

    Raises:
        ValueError: no line can be made of these.
    """
    key = new_key()
    options = [f"scopes={scopes}"] if scopes != Scope.USE else []
    options += [f"{what}={most}" for what in LIMITS if (most := getattr(limits, what)) is not None]
    line = " ".join([f"{name}:{key}" if name else key, *options])
    if key_entry(line, "key").key.get_secret_value() != key or (name or "").startswith("#"):
        raise ValueError("has a name with a colon, or that begins with `#`")
    return key, line


def with_key_file(access: AccessSettings) -> AccessSettings:
    """The settings with the keys of API_KEY_FILE among those of API_KEY.

    Raises:
        StartupError: it cannot be read, or is no list of keys. No key is in the sentence.
    """
    path = access.api_key_file
    if path is None:
        return access
    entries = (*access.api_key, *_entries(path, _text(path)))
    try:
        check_unique(entries)
    except ValueError:
        raise StartupError(f"API_KEY_FILE={path}: a key or a name is there twice, or in API_KEY too.") from None
    return access.model_copy(update={"api_key": entries})


def readable_by_others(path: Path) -> bool:
    """Whether the file's mode lets more users read it than its owner and a group that was chosen for it.

    A file of another owner that this process may read through its group was given that group for this.
    """
    try:
        status = path.stat()
    except OSError:
        return False
    own = hasattr(os, "geteuid") and status.st_uid == os.geteuid()
    return bool(status.st_mode & (stat.S_IROTH | (stat.S_IRGRP if own else 0)))


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise StartupError(f"API_KEY_FILE={path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise StartupError(f"API_KEY_FILE={path} is no text.") from None
    if len(text) > LARGEST:
        raise StartupError(f"API_KEY_FILE={path} is larger than {LARGEST} bytes.")
    return text


def _entries(path: Path, text: str) -> Sequence[KeyEntry]:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            entries.append(key_entry(entry, f"line {number}"))
        except ValueError as error:
            raise StartupError(f"API_KEY_FILE={path}, line {number}: {error}.") from None
    if not entries:
        # It was meant to lock the server; without a key it would be open to everyone.
        raise StartupError(f"API_KEY_FILE={path} holds no key: write one a line, or leave the setting out.")
    return entries
