"""Fixtures with real parts: the bundled weights, a server in a process of its own, an app in this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from benchmarks.servers import RunningServer, free_port, running, vecmill_command
from vecmill.app import create_app
from vecmill.config import Settings, load_settings
from vecmill.core.health import Phase
from vecmill.models.source import find


@pytest.fixture(scope="session", autouse=True)
def hermetic() -> Iterator[None]:
    """No hub, no settings of whoever runs the tests, no `.env` beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for group in Settings.__annotations__:
            patch.delenv(group.upper(), raising=False)
        for name in ("DEVICE", "DTYPE", "EMBED_MODEL", "HOST", "PORT", "LOG_FORMAT", "LOG_LEVEL"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """`vecmill serve` on the bundled model, as a user starts it."""
    port = free_port()
    with running(vecmill_command(port), port, "/ready") as server:
        yield server


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The bundled model's files."""
    return find("auto").folder


@asynccontextmanager
async def serving(**flags: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, its model loaded in float32."""
    app = create_app(load_settings({"dtype": "float32", "device": "cpu", **flags}))
    async with app.router.lifespan_context(app):
        await settled(app)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vecmill", timeout=60) as client:
            
            yield client


async def settled(app: FastAPI) -> None:
    """Wait until the model is loaded or could not be."""
    async with asyncio.timeout(60):
        while app.state.services.health.snapshot()[0] is Phase.LOADING:
            await asyncio.sleep(0.01)  # loading runs in a thread that has no event to await


@pytest.fixture(scope="session")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """The shared in-process application, with default limits."""
    async with serving() as client:
        yield client
