"""Requests to an application in this process."""

from __future__ import annotations

import asyncio

import httpx


class InProcess(httpx.ASGITransport):
    """httpx's, which lets the event loop turn before each request.

    A request that waits for nothing ends without that: a test that asks until something happens would keep it from
    happening. A socket lets it turn too.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        return await super().handle_async_request(request)
