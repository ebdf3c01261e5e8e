"""Two people's keys and an administrator's, and requests with them."""

from __future__ import annotations

from typing import Any

import httpx

ANN, BEN, ADMIN = "the-secret-of-ann-1", "the-secret-of-ben-2", "the-secret-of-the-admin"
KEYS = f"ann:{ANN},ben:{BEN}"
LOCKED = {"api_key": KEYS, "admin_api_key": ADMIN}


def bearer(key: str) -> dict[str, str]:
    """The header that a key is sent in."""
    return {"Authorization": f"Bearer {key}"}


async def ask(client: httpx.AsyncClient, key: str, method: str, path: str, **content: Any) -> httpx.Response:
    """A request with a key."""
    headers = {**bearer(key), **content.pop("headers", {})}
    return await client.request(method, path, headers=headers, **content)
