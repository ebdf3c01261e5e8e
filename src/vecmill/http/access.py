"""Who may use the server: the keys that open it, and what web pages may do that somebody on this machine has open.

Without keys a server is open to every program that reaches it, and a web page that somebody has open is one: it may
post to any address. So then a page of another origin is refused, and so is a request by a name that only such a page
would know this server by (DNS rebinding), whatever address is bound.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address, ip_network

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from vecmill.config import AccessSettings
from vecmill.config.key_file import KeyEntry
from vecmill.core.address import is_address
from vecmill.core.errors import InvalidApiKey, NotAllowed, VecmillError
from vecmill.core.types import NO_LIMITS, KeyLimits, Scope, Viewer
from vecmill.http.errors import refused
from vecmill.http.origins import Origins, not_allowed

# What load balancers and supervisors ask.
PROBES = frozenset(
    {"/health", "/ready", "/v1/health/live", "/v1/health/ready", "/.well-known/live", "/.well-known/ready"}
)
# And pages a browser opens by itself, which hold no secrets.
OPEN = PROBES | {"/dashboard", "/docs", "/openapi.json"}
OPEN_BELOW = ("/static/", "/static-offline-docs/")
READING = ("GET", "HEAD", "OPTIONS")
# Names that nobody can buy: reserved (RFC 6761, 6762, 8375; ICANN's .internal), or of no public registry.
LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan", ".svc")
HOST_NAME = socket.gethostname().lower()


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def in_both_families(networks: Iterable[str]) -> list[str]:
    """Addresses and networks, those of IPv4 also as a socket for both families shows them (`::ffff:10.0.0.1`)."""
    both = list(networks)
    for network in map(ip_network, list(both)):
        if network.version == 4:
            both.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
    return both


class Access:
    """ASGI middleware: 401 without a key where there are keys; 403 for a name or an origin that is not allowed."""

    def __init__(
        self,
        app: ASGIApp,
        settings: AccessSettings,
        keys: ApiKeys,
        host: str,
        on_job: Callable[[str, Viewer], None] = lambda job_id, viewer: None,
    ) -> None:
        """`host` is the address that the server binds; `on_job` is told of every request that carries `X-Job-ID`."""
        self._app = app
        self._keys = keys
        self._origins = Origins(settings.cors_origins)
        self._on_job = on_job
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self._is_loopback = is_loopback(host)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._host_error(scope["path"], headers) or self._origin_error(scope["method"], headers)
        holder = self._keys.holder_of(presented_key(headers))
        if holder is None and not is_open(scope["method"], scope["path"]):
            error = error or InvalidApiKey()
        holder = holder or NOBODY
        scope.setdefault("state", {}).update(viewer=holder.viewer, may_use=holder.may_use, api_key_name=holder.name)
        if error is not None:
            response = await refused(Request(scope, receive), error)
            await response(scope, receive, send)
            return
        if job_id := headers.get("x-job-id"):
            self._on_job(job_id, holder.viewer)
        await self._app(scope, receive, send)

    def _host_error(self, path: str, headers: Headers) -> VecmillError | None:
        host = _without_port(headers.get("host", ""))
        # Who probes a pod or a container calls it by its address, which ALLOWED_HOSTS cannot know.
        if (path in PROBES and is_address(host)) or self._answers_to(host):
            return None
        cure = "use localhost" if self._is_loopback else "set API_KEY, or use its address"
        return NotAllowed(
            f"This server does not answer to the name {host[:100]!r}: add it to ALLOWED_HOSTS, or {cure}."
        )

    def _answers_to(self, host: str) -> bool:
        """By ALLOWED_HOSTS; without it by every name where a key is needed, else by local ones."""
        if self._hosts:
            return host in self._hosts or "*" in self._hosts
        return bool(self._keys) or _is_local(host)

    def _origin_error(self, method: str, headers: Headers) -> VecmillError | None:
        origin = headers.get("origin")
        if origin is None or self._keys or method in READING:
            return None
        if origin in self._origins or origin.partition("://")[2] == headers.get("host"):
            return None
        return not_allowed(origin)


def presented_key(headers: Headers) -> str:
    """The key that a request carries; empty where there is none.

    LlamaIndex's client of TEI sends `Authorization` without `Bearer`.
    """
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return headers.get("x-api-key") or headers.get("api-key") or ("" if token else scheme)


def may_use(request: Request) -> bool:
    """Whether the request may ask for work: it has a key that allows it, or the server has no keys."""
    return bool(getattr(request.state, "may_use", True))


def is_open(method: str, path: str) -> bool:
    """Whether a call needs no key where there are keys.

    What is open has only routes that read: another method is answered with 405 and what it allows. On `/` work is done
    too.
    """
    return path in OPEN or path.startswith(OPEN_BELOW) or (path == "/" and method in READING)


def _without_port(host: str) -> str:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    return name.strip("[]").lower()


def _is_local(host: str) -> bool:
    """Addresses, which no web page can give another meaning, and names that lead to this machine or its network.

    A name of one label is no web page's: it is looked up in this network, as `vecmill` in a compose file or a cluster.
    """
    name = host.removesuffix(".")
    return is_address(host) or "." not in name or name == HOST_NAME or name.endswith(LOCAL_SUFFIXES)


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of an API key, and what that key allows."""

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
"""A request without a key for a page that needs none, on a server with keys."""


@dataclass(frozen=True, slots=True)
class _Known:
    holders: tuple[tuple[bytes, Holder], ...]
    """By digest."""
    admin: bytes | None
    limits: dict[str | None, KeyLimits]
    """By owner."""
    names: dict[str | None, str | None]
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
    def in_use(self) -> bool:
        """Whether there are keys, be it that of an administrator alone."""
        return bool(self._known.holders) or self._known.admin is not None

    @property
    def several(self) -> bool:
        """Whether more than one key opens the server, so that one holder must not learn of another's texts."""
        known = self._known
        return len(known.holders) + (known.admin is not None and bool(known.holders)) > 1

    def holder_of(self, key: str) -> Holder | None:
        """The holder of a presented key; None if there is none. Every key is compared, in constant time."""
        known, given, holder = self._known, _digest(key), None
        if known.admin is not None and compare_digest(given, known.admin):
            holder = ADMIN
        for digest, candidate in known.holders:
            if compare_digest(given, digest) and holder is None:
                holder = candidate
        if holder is None and not known.holders:
            return ANYONE if known.admin is None else ANYONE_BESIDE_AN_ADMIN
        return holder

    def name_of(self, owner: str | None) -> str | None:
        """The name of an owner's key; None for a key that is gone, and where there are no keys."""
        return self._known.names.get(owner)

    def shown_name(self, owner: str | None) -> str | None:
        """The same where people see it; a key that is gone is called as it was, or by its digest's beginning."""
        kind, _, rest = (owner or "").partition(":")
        return self.name_of(owner) or (f"key {rest[:8]}" if kind == "key" else rest or None)

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
    names = {ADMIN.owner: ADMIN.name, **{holder.owner: holder.name for _, holder in known}}
    return _Known(known, None if admin is None else _digest(admin.get_secret_value()), limits, names)


def _owner(entry: KeyEntry, digest: bytes) -> str:
    """A key without a name is known by its value: what stands in its place tomorrow may be another key."""
    return f"name:{entry.name}" if entry.is_named else f"key:{digest.hex()[:32]}"


def _digest(key: str) -> bytes:
    """Of the same length for all keys."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
