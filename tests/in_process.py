"""Requests to an application in this process."""

from __future__ import annotations

import asyncio

import httpx


class InProcess(httpx.ASGITransport):
    """httpx's transport for ASGI, but other tasks run before each request.

    Without this a request that never waits would let no other task run, and a test that polls would block what it
    polls for. Requests over a socket let other tasks run too.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        return await super().handle_async_request(request)
