"""An application in this process whose forward passes wait until a test lets them go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.in_process import InProcess
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.core.types import Lane
from vecmill.engine import engine as engine_module
from vecmill.engine import forward
from vecmill.http.services import Services


class Gate:
    """Holds every forward pass until the test opens it, and notes the lengths of the rows that each has."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._launch = forward.launch
        self.batches: list[list[int]] = []

    def __call__(self, model: Any, rows: Any, *args: Any, **flags: Any) -> Any:
        assert self._open.wait(30)
        self.batches.append([len(row) for row in rows])
        return self._launch(model, rows, *args, **flags)

    def open(self) -> None:
        """Let all of them go."""
        self._open.set()

    def close(self) -> None:
        """Hold those that come from now on."""
        self._open.clear()
        self.batches.clear()


def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What a fixture yields."""
    gate = Gate()
    monkeypatch.setattr(engine_module, "launch", gate)
    yield gate
    gate.open()


@asynccontextmanager
async def small_server(folder: Path, **flags: object) -> AsyncIterator[tuple[httpx.AsyncClient, Services]]:
    """One text a forward pass, so that the order of the passes is the order of the texts."""
    quick = {"dtype": "float32", "device": "cpu", "max_batch_size": 1}
    app: FastAPI = create_app(load_settings({"embed_model": str(folder), **quick, **flags}))
    async with app.router.lifespan_context(app):
        await app.state.loading
        async with from_address(app, "127.0.0.1") as client:
            yield client, app.state.services


def from_address(app: Any, address: str) -> httpx.AsyncClient:
    """A client whose requests come from an address."""
    transport = InProcess(app, raise_app_exceptions=False, client=(address, 123))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)


async def until_waiting(services: Services, lane: Lane, count: int) -> None:
    async with asyncio.timeout(20):
        while services.inference.waiting[lane] < count:
            await asyncio.sleep(0.001)


def words(count: int) -> str:
    return " ".join(["word"] * (count - 2))
