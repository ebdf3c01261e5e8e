"""The keys that open the server, and who holds them. They can be exchanged while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest

from vecmill.config import AccessSettings
from vecmill.config.key_file import KeyEntry
from vecmill.core.types import NO_LIMITS, KeyLimits, Scope, Viewer

ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever has one key."""

    name: str | None
    """For the log."""
    owner: str | None
    """What the records of its jobs, files and batches say. A named key keeps them when its value is exchanged."""
    scopes: frozenset[Scope] = ALL_SCOPES
    limits: KeyLimits = NO_LIMITS

    @property
    def may_use(self) -> bool:
        """Whether the holder may ask for work."""
        return Scope.USE in self.scopes

    @property
    def viewer(self) -> Viewer:
        """Whose things the holder sees."""
        return Viewer(self.owner, Scope.ADMIN in self.scopes, self.limits)


ADMIN = Holder("admin", "admin")
"""The holder of ADMIN_API_KEY."""
ANYONE = Holder(None, None)
"""Where there are no keys."""
ANYONE_BESIDE_AN_ADMIN = Holder(None, None, frozenset({Scope.USE}))
NOBODY = Holder(None, None, frozenset())
"""Who came without a key where keys are needed, to a page that is open."""


@dataclass(frozen=True, slots=True)
class _Known:
    holders: tuple[tuple[bytes, Holder], ...]
    """By digest."""
    admin: bytes | None
    limits: dict[str | None, KeyLimits]
    """By owner."""


class ApiKeys:
    """Holders by key. Whoever looks sees either all the old keys or all the new ones."""

    def __init__(self, settings: AccessSettings) -> None:
        self._known = _known(settings)

    def exchange(self, settings: AccessSettings) -> None:
        """From the next request on these are the keys."""
        self._known = _known(settings)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._known.holders)

    @property
    def several(self) -> bool:
        """Whether there is anybody to keep one holder's secrets from."""
        known = self._known
        return len(known.holders) + (known.admin is not None and bool(known.holders)) > 1

    def holder_of(self, key: str) -> Holder | None:
        """Who presented this key. Every key is compared, in constant time, whichever fits."""
        known, given, holder = self._known, _digest(key), None
        if known.admin is not None and compare_digest(given, known.admin):
            holder = ADMIN
        for digest, candidate in known.holders:
            if compare_digest(given, digest) and holder is None:
                holder = candidate
        if holder is None and not known.holders:
            return ANYONE if known.admin is None else ANYONE_BESIDE_AN_ADMIN
        return holder

    def limits_of(self, owner: str | None) -> KeyLimits:
        """What a key may have in progress; no limits for a key that is gone."""
        return self._known.limits.get(owner, NO_LIMITS)


def _known(settings: AccessSettings) -> _Known:
    admin = settings.admin_api_key
    holders = [(_digest(entry.key.get_secret_value()), entry) for entry in settings.api_key]
    known = tuple(
        (digest, Holder(entry.name, _owner(entry, digest), entry.scopes, entry.limits)) for digest, entry in holders
    )
    limits = {holder.owner: holder.limits for _, holder in known}
    return _Known(known, None if admin is None else _digest(admin.get_secret_value()), limits)


def _owner(entry: KeyEntry, digest: bytes) -> str:
    """A key without a name is known by its value: what stands in its place tomorrow may be another key."""
    return f"name:{entry.name}" if entry.is_named else f"key:{digest.hex()[:32]}"


def _digest(key: str) -> bytes:
    """Of the same length for all keys."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
