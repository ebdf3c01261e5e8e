"""Loading, ready, failed, draining: what /health says and what a request gets in each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.in_process import InProcess
from tests.tiny_checkpoints import tiny_bert
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.core.types import Lane
from vecmill.engine import engine as engine_module
from vecmill.engine import forward
from vecmill.engine.loader import load
from vecmill.http.services import Services

QUICK = {"device": "cpu", "dtype": "float32"}


def http(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=InProcess(app), base_url="http://localhost", timeout=30)


@pytest.fixture
def folder(tmp_path: Path, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path / "tiny", minilm_folder)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds the load, in its thread, until it is set."""
    gate = threading.Event()

    def held(models: Any, engine: Any, report: Any, measurements: Any, **options: Any) -> Any:
        report(42, "loading something large")
        assert gate.wait(30)
        return load(models, engine, report, **options)

    monkeypatch.setattr(engine_module, "load", held)
    yield gate
    gate.set()


async def test_the_port_answers_while_the_model_loads(folder: Path, gate: threading.Event) -> None:
    app = create_app(load_settings({"embed_model": str(folder), **QUICK}))
    async with app.router.lifespan_context(app), http(app) as client:
        async with asyncio.timeout(30):
            while (health := await client.get("/health")).json()["percent"] < 42:
                await asyncio.sleep(0.01)
        assert health.status_code == 503
        assert (health.json()["status"], health.json()["message"]) == ("loading", "loading something large")
        assert (await client.get("/ready")).status_code == 503
        for path, body in (("/embed", {"inputs": "x"}), ("/v1/rerank", {"query": "q", "documents": ["d"]})):
            refused = await client.post(path, json=body)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert "temporarily" in refused.text
            assert "42 %" in refused.text
        assert (await client.get("/v1/models")).json()["data"] == []
        for path in ("/stats", "/stats/detailed", "/capabilities", "/jobs", "/metrics", "/"):
            assert (await client.get(path)).status_code == 200
        gate.set()
        await app.state.loading
        ready = await client.get("/health")
        assert (ready.status_code, ready.json()["status"], ready.json()["percent"]) == (200, "ok", 100)
        assert ready.json()["models"] == {"embed": "tiny", "rerank": "tiny"}
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post("/embed", json={"inputs": "x"})).status_code == 200


async def test_a_load_that_fails_is_told_and_stays(tmp_path: Path) -> None:
    reasons: list[str] = []
    app = create_app(load_settings({"embed_model": str(tmp_path / "nowhere"), **QUICK}), reasons.append)
    async with app.router.lifespan_context(app), http(app) as client:
        await app.state.loading
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "no such folder" in health.json()["message"]
        assert [health.json()["message"]] == reasons
        assert (await client.post("/embed", json={"inputs": "x"})).status_code == 503


async def test_a_device_that_dies_turns_health_to_503(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(load_settings({"embed_model": str(folder), **QUICK}))
    async with app.router.lifespan_context(app), http(app) as client:
        await app.state.loading

        def broken(*args: object) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(engine_module, "launch", broken)
        for _ in range(2):
            refused = await client.post("/v1/embeddings", json={"input": ["x"] * 200})
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "server_error"
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "must be restarted" in health.json()["message"]


async def test_stopping_answers_what_runs_and_refuses_what_comes(folder: Path) -> None:
    app = create_app(load_settings({"embed_model": str(folder), "max_batch_size": 1, **QUICK}))
    async with http(app) as client:
        async with app.router.lifespan_context(app):
            await app.state.loading
            services: Services = app.state.services
            running = asyncio.create_task(client.post("/embed", json={"inputs": ["x"] * 500}))
            while services.inference.waiting[Lane.BULK] == 0:
                await asyncio.sleep(0)
        assert (await asyncio.wait_for(running, 10)).status_code in (200, 503)
        late = await client.post("/embed", json={"inputs": "late"})
        assert late.status_code == 503
        assert "shutting down" in late.json()["error"]


async def test_a_device_that_answers_nothing_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, launch = threading.Event(), forward.launch

    def held(*args: Any, **flags: Any) -> Any:
        assert gate.wait(30)
        return launch(*args, **flags)

    monkeypatch.setattr(engine_module, "launch", held)
    monkeypatch.setattr(engine_module, "FEWEST_SECONDS", 0.0)
    monkeypatch.setattr(engine_module, "TIMES_EXPECTED", 0)
    app = create_app(load_settings({"embed_model": str(folder), **QUICK}))
    async with app.router.lifespan_context(app), http(app) as client:
        await app.state.loading
        assert (await client.get("/health")).json()["status"] == "ok"
        running = asyncio.create_task(client.post("/embed", json={"inputs": "x"}))
        async with asyncio.timeout(30):
            while (health := await client.get("/health")).status_code == 200:
                await asyncio.sleep(0.01)
        assert (health.status_code, health.json()["status"]) == (503, "hung")
        assert "answered nothing" in health.json()["message"]
        assert (await client.get("/ready")).status_code == 503
        gate.set()
        assert (await running).status_code == 200
        assert (await client.get("/health")).json()["status"] == "ok"
        assert (await client.get("/ready")).status_code == 200


async def test_a_client_that_leaves_frees_its_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, launch = threading.Event(), forward.launch

    def held(*args: Any, **flags: Any) -> Any:
        assert gate.wait(30)
        return launch(*args, **flags)

    monkeypatch.setattr(engine_module, "launch", held)
    app = create_app(load_settings({"embed_model": str(folder), "max_batch_size": 2, **QUICK}))
    async with app.router.lifespan_context(app), http(app) as client:
        await app.state.loading
        services: Services = app.state.services
        left = asyncio.Event()
        sent: list[Any] = []
        messages = iter([{"type": "http.request", "body": b'{"inputs": ["a", "b", "c", "d", "e", "f", "g", "h"]}'}])

        async def receive() -> Any:
            if (message := next(messages, None)) is not None:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/embed",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        request = asyncio.create_task(app(scope, receive, send))
        while sum(services.inference.waiting.values()) != 4:  # two batches of two are with the device
            await asyncio.sleep(0)
        left.set()
        await asyncio.wait_for(request, 10)
        assert sent[0]["status"] == 499
        assert services.inference.admission.requests == 0
        gate.set()
        assert (await client.post("/embed", json={"inputs": "next"})).status_code == 200
        assert services.inference.stats.abandoned == 4
