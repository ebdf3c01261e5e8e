"""HOST and PORT: free, or who has them."""

from __future__ import annotations

import errno
import os
import socket

from vecmill import __version__
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding, fail, ok, warn
from vecmill.tools.doctor.running import RunningServer


def check(context: Context) -> Finding:
    """Bind it as the server would, for a moment, without listening."""
    host, port = context.settings.http.host, context.settings.http.port
    address = f"HOST={host} PORT={port}"
    if port == 0:
        return ok(f"{address}: a free port is taken")
    try:
        _bind(host, port)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return judge_taken(address, port, context.server)
        return judge_error(address, error)
    return ok(f"{address} is free")


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def judge_taken(address: str, port: int, server: RunningServer | None) -> Finding:
    """By what answers there."""
    if server is None or not server.is_vecmill:
        who = "something that does not speak HTTP"
        if server is not None:
            who = f"an HTTP server that is not vecmill ({server.software or 'it does not say which'})"
        return fail(
            f"{address} is taken by {who}",
            f"sudo ss -ltnp 'sport = :{port}' shows what it is; stop it, or set another PORT.",
        )
    facts = {"version": server.version, "status": server.status}
    seen = f"{address}: vecmill {server.version} runs there, status {server.status}"
    if server.status != "ok":
        return warn(seen, f"curl {server.url}/health says why; its log says more.", **facts)
    if server.version != __version__:
        return warn(seen, f"This is {__version__}: restart the server to have it run that.", **facts)
    return ok(seen, **facts)


def judge_error(address: str, error: Exception) -> Finding:
    """Why it cannot be bound, other than that it is taken."""
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM):
        return fail(f"{address}: this user may not bind it", "Set a PORT of 1024 or above.")
    reason = os.strerror(number) if isinstance(number, int) and number > 0 else str(error)
    return fail(
        f"{address} cannot be bound ({reason})", "Set HOST to an address of this machine, 127.0.0.1 or 0.0.0.0."
    )
