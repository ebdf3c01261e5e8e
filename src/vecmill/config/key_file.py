"""API_KEY_FILE: keys in a file of their own, one a line."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

from vecmill.config.groups import PRINTABLE, AccessSettings
from vecmill.core.errors import StartupError

LARGEST = 1_048_576  # bytes; what is more was not meant


def with_key_file(access: AccessSettings) -> AccessSettings:
    """The settings with the keys of API_KEY_FILE among those of API_KEY.

    Raises:
        StartupError: it cannot be read, or is no list of keys. No key is in the sentence.
    """
    path = access.api_key_file
    if path is None:
        return access
    keys = (*access.api_key, *_keys(path, _text(path)))
    values = {key.get_secret_value() for _, key in keys}
    if len(values) < len(keys) or len({name for name, _ in keys}) < len(keys):
        raise StartupError(f"API_KEY_FILE={path}: a key or a name is there twice, or in API_KEY too.")
    return access.model_copy(update={"api_key": keys})


def readable_by_others(path: Path) -> bool:
    """Whether the file's mode lets more users read it than its owner and a group that was chosen for it.

    A file of another owner that this process may read through its group was given that group for this.
    """
    try:
        found = path.stat()
    except OSError:
        return False
    own = hasattr(os, "geteuid") and found.st_uid == os.geteuid()
    return bool(found.st_mode & (stat.S_IROTH | (stat.S_IRGRP if own else 0)))


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


def _keys(path: Path, text: str) -> Sequence[tuple[str, SecretStr]]:
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, colon, key = entry.partition(":")
        name, key = (name.strip(), key.strip()) if colon else (f"line {number}", entry)
        if not name or not PRINTABLE.fullmatch(key):
            raise StartupError(
                f"API_KEY_FILE={path}, line {number}: must be `key` or `name:key`, the key of ASCII without spaces."
            )
        keys.append((name, SecretStr(key)))
    if not keys:
        # It was meant to lock the server; without a key it would be open to everyone.
        raise StartupError(f"API_KEY_FILE={path} holds no key: write one a line, or leave the setting out.")
    return keys
