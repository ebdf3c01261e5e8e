"""Where a server is reached."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address

# What binds every address is reached at loopback.
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def url_here(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that binds `host` and `port`."""
    host = EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@lru_cache(maxsize=128)  # of names that clients choose, so few: each may be as long as a request's head
def is_address(host: str) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
