"""Where a server is reached."""

from __future__ import annotations

# What binds every address is reached at loopback.
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def url_here(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that binds `host` and `port`."""
    host = EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
