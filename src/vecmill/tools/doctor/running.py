"""The server that answers at the settings' address, if one does."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2

from vecmill.core.address import url_here

PATIENCE = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Something that speaks HTTP there. `version` and `status` are /health's; None where it is not vecmill."""

    url: str
    status_code: int
    software: str | None
    """Its `Server` header."""
    version: str | None
    status: str | None

    @property
    def is_vecmill(self) -> bool:
        return self.version is not None


def server_at(host: str, port: int) -> RunningServer | None:
    """Ask /health; None where nothing answers in HTTP."""
    if port == 0:
        return None
    url = url_here(host, port)
    try:
        answer = httpx2.get(f"{url}/health", timeout=PATIENCE, trust_env=False)
        said = answer.json() if "json" in answer.headers.get("content-type", "") else {}
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
        return None
    ours = isinstance(said, dict) and {"version", "status", "embedding_models"} <= said.keys()
    return RunningServer(
        url,
        answer.status_code,
        answer.headers.get("server"),
        str(said["version"]) if ours else None,
        str(said["status"]) if ours else None,
    )
