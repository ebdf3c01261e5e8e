"""The keys that open the server. They can be exchanged while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest

from vecmill.config import AccessSettings


@dataclass(frozen=True, slots=True)
class _Known:
    keys: tuple[tuple[str, bytes], ...]
    admin: bytes | None


class Keys:
    """Names by key. Whoever looks sees either all the old keys or all the new ones."""

    def __init__(self, settings: AccessSettings) -> None:
        self._known = _known(settings)

    def exchange(self, settings: AccessSettings) -> None:
        """From the next request on these are the keys."""
        self._known = _known(settings)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._known.keys)

    def name_of(self, key: str) -> str | None:
        """The name of the key that was presented. Every key is compared, in constant time, whichever fits."""
        given, found = _digest(key), None
        for name, digest in self._known.keys:
            if compare_digest(given, digest):
                found = name
        return found

    def is_admin(self, key: str) -> bool:
        """The holder of ADMIN_API_KEY; everyone where there are no keys at all."""
        known = self._known
        if known.admin is None:
            return not known.keys
        return compare_digest(_digest(key), known.admin)


def _known(settings: AccessSettings) -> _Known:
    admin = settings.admin_api_key
    return _Known(
        tuple((name, _digest(key.get_secret_value())) for name, key in settings.api_key),
        None if admin is None else _digest(admin.get_secret_value()),
    )


def _digest(key: str) -> bytes:
    """Of the same length for all keys."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
