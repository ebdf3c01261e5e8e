"""Who may use the server: keys, and what web pages may do that somebody on this machine has open.

Without keys a server is open to every program that reaches it, and a web page that somebody has open is one: it may
post to any address. So then a page of another origin is refused, and so is a request by a name that only such a page
would know this server by (DNS rebinding), whatever address is bound.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import ip_address, ip_network

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vecmill.config import AccessSettings
from vecmill.core.errors import InvalidApiKey, NotAllowed, VecmillError
from vecmill.core.types import Viewer
from vecmill.http.errors import refused
from vecmill.http.keys import NOBODY, ApiKeys
from vecmill.http.origins import Origins, not_allowed

# What load balancers and supervisors ask.
PROBES = frozenset(
    {"/health", "/ready", "/v1/health/live", "/v1/health/ready", "/.well-known/live", "/.well-known/ready"}
)
# And pages a browser opens by itself, which hold no secrets.
OPEN = PROBES | {"/", "/docs", "/openapi.json"}
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        if path in PROBES and _is_address(host):
            return None
        local_names_only = not self._hosts and not self._keys
        if host in self._hosts or (not self._hosts and not local_names_only) or "*" in self._hosts:
            return None
        if local_names_only and _is_local(host):
            return None
        cure = "use localhost" if self._is_loopback else "set API_KEY, or use its address"
        return NotAllowed(
            f"This server does not answer to the name {host[:100]!r}: add it to ALLOWED_HOSTS, or {cure}."
        )

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
    """Whether whoever asks may use the server: with a key where there are keys. Pages without a key need not."""
    return bool(getattr(request.state, "may_use", True))


def is_open(method: str, path: str) -> bool:
    """Whether a call needs no key where there are keys."""
    return method in READING and (path in OPEN or path.startswith(OPEN_BELOW))


def _without_port(host: str) -> str:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    return name.strip("[]").lower()


def _is_local(host: str) -> bool:
    """Addresses, which no web page can give another meaning, and names that lead to this machine or its network.

    A name of one label is no web page's: it is looked up in this network, as `vecmill` in a compose file or a cluster.
    """
    name = host.removesuffix(".")
    return _is_address(host) or "." not in name or name == HOST_NAME or name.endswith(LOCAL_SUFFIXES)


@lru_cache(maxsize=128)  # of names that clients choose, so few: each may be as long as a request's head
def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
