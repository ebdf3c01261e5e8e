"""A start: what it imports, models that answer before the others are loaded, and what is measured afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.conftest import serving
from tests.in_process import InProcess
from tests.tiny_checkpoints import tiny_bert
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.engine import live_models
from vecmill.engine.forward import LoadedModel
from vecmill.engine.live_models import LiveModels
from vecmill.inference import measuring

# Each takes as long to import as the rest of a start, or longer.
NEEDLESS = (
    *("transformers", "sympy", "scipy", "sklearn", "huggingface_hub", "torch._dynamo", "torch._inductor"),
    *("torch.distributed.tensor", "vecmill.tools", "opentelemetry.sdk"),
)
START = f"""
import asyncio, json, sys
import vecmill.__main__, vecmill.serve
from tests.in_process import InProcess
from vecmill.app import create_app
from vecmill.config import load_settings
import httpx

async def answer():
    app = create_app(load_settings({{"device": "cpu", "cache_max_bytes": "0"}}))
    async with app.router.lifespan_context(app):
        await app.state.loading
        async with httpx.AsyncClient(transport=InProcess(app), base_url="http://localhost") as client:
            found = await client.post("/v1/embeddings", json={{"input": "one"}})
            needless = [name for name in {NEEDLESS!r} if name in sys.modules]
            print(json.dumps([found.status_code, needless]))

asyncio.run(answer())
"""


def test_the_bundled_model_answers_without_what_takes_seconds_to_import(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, timeout=120, check=True, env=_clean(tmp_path)
    )
    status, needless = json.loads(done.stdout.splitlines()[-1])
    # The tests' client imports tools of its own.
    assert (status, [name for name in needless if name != "vecmill.tools"]) == (200, [])


def _clean(state: Path) -> dict[str, str]:
    return {**os.environ, "STATE_DIR": str(state), "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def folders(tmp_path: Path, minilm_folder: Path) -> list[Path]:
    return [tiny_bert(tmp_path / name, minilm_folder, seed=seed) for seed, name in enumerate(("one", "other"))]


class Held:
    """The reading of all models but the first, held up until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        self.error: Exception | None = None
        read = LiveModels.read

        def held(live: LiveModels, key: str, report: Callable[[float, str], None]) -> LoadedModel:
            report(40, f"loading {key}")
            assert self.may_go_on.wait(30)
            if self.error is not None:
                raise self.error
            return read(live, key, report)

        monkeypatch.setattr(LiveModels, "read", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


@asynccontextmanager
async def starting(
    folders: list[Path], state: Path, failures: list[str], **flags: object
) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """A server whose first model answers."""
    names = ",".join(map(str, folders))
    settings = {"embed_model": names, "dtype": "float32", "device": "cpu", "max_batch_tokens": 128, "state_dir": state}
    app = create_app(load_settings({**settings, **flags}), failures.append)
    async with app.router.lifespan_context(app):
        transport = InProcess(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            async with asyncio.timeout(60):
                while (await embedded(client, "one")).status_code != 200:
                    await asyncio.sleep(0.02)
            yield client, app


async def embedded(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": name, "input": "one text"})


@pytest.mark.parametrize("ready_when", ["all", "first"])
async def test_a_model_answers_before_the_others_are_loaded(
    folders: list[Path], held: Held, tmp_path: Path, ready_when: str
) -> None:
    failures: list[str] = []
    flags = {"load_timeout": 2, "ready_when": ready_when}
    async with starting(folders, tmp_path / "state", failures, **flags) as (client, app):
        early = 200 if ready_when == "first" else 503
        health, ready = await client.get("/health"), await client.get("/ready")
        assert (health.status_code, ready.status_code, ready.json()) == (early, early, {"ready": early == 200})
        assert health.json()["status"] == ("ok" if early == 200 else "loading")
        assert health.json()["loading"] == ["other"]
        assert early == 200 or (health.json()["percent"], health.json()["message"]) == (70, "loading embed:other")
        assert [each["name"] for each in (await client.get("/api/ps")).json()["models"]] == ["one"]
        assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["one", "other"]
        states = {each["id"]: (each["state"], each["progress"]) for each in await models(client)}
        assert states == {"one": ("loaded", None), "other": ("loading", 40)}

        late = await embedded(client, "other")
        assert (late.status_code, int(late.headers["Retry-After"]) > 0) == (503, True)
        assert "it was not ready within 2 s (LOAD_TIMEOUT; 40 %, loading embed:other)" in late.text

        waiting = asyncio.create_task(embedded(client, "other"))
        await asyncio.sleep(0.05)
        held.may_go_on.set()
        assert (await waiting).status_code == 200
        await app.state.loading
        assert ((await client.get("/ready")).status_code, (await client.get("/health")).json()["loading"]) == (200, [])
        assert failures == []


async def models(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await client.get("/dashboard/models")).json()["models"]
    return listed


async def test_a_start_fails_with_each_of_its_models(folders: list[Path], held: Held, tmp_path: Path) -> None:
    """As it does where the first cannot be loaded: the process ends (`tests/serve`), and says why."""
    failures: list[str] = []
    held.error = StartupError("other: weight x has values that are not finite.")
    async with starting(folders, tmp_path / "state", failures) as (client, app):
        waiting = asyncio.create_task(embedded(client, "other"))
        await asyncio.sleep(0.05)
        held.may_go_on.set()
        await app.state.loading
        assert failures == ["other: weight x has values that are not finite."]
        assert app.state.server.misconfigured
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["message"]) == (503, "failed", failures[0])
        assert (await waiting).status_code == 503
        assert (await embedded(client, "one")).status_code == 200  # until the process ends


async def costs(client: httpx.AsyncClient) -> dict[str, Any]:
    """Once they are measured."""
    async with asyncio.timeout(60):
        while True:
            [found] = (await client.get("/capabilities")).json()["forward_passes"].values()
            if not found["provisional"]:
                return dict(found)
            await asyncio.sleep(0.02)


async def test_a_quiet_server_measures_again_and_takes_the_faster_type_at_the_next_start(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine does something else when the first start compares the types."""
    monkeypatch.setattr(measuring, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(measuring, "BUSY_PERCENT", 101.0)
    rates = {torch.float32: 100.0, torch.bfloat16: 90.0}
    monkeypatch.setattr("vecmill.engine.device._chosen_on_cpu", {})
    monkeypatch.setattr("vecmill.engine.device.cpu_rates", lambda width: rates)
    monkeypatch.setattr(live_models, "cpu_rates", lambda width, check: {**rates, torch.bfloat16: 200.0})
    flags: dict[str, Any] = {"embed_model": str(folders[0]), "dtype": "auto", "state_dir": str(tmp_path / "state")}
    caplog.set_level("INFO")

    async with serving(**flags) as client:
        before, measured = (await client.get("/health")).json()["dtype"], await costs(client)
        assert (before, measured["next_dtype"]) == ("float32", "bfloat16")
        assert max(each["tokens"] for each in measured["measured"]) == 128
        assert (await client.get("/health")).json()["dtype"] == "float32"
        assert "bfloat16 is faster than float32 on this machine when it is quiet" in caplog.text
    monkeypatch.setattr("vecmill.engine.device._chosen_on_cpu", {})
    async with serving(**flags) as client:
        health, measured = (await client.get("/health")).json(), await costs(client)
        assert (health["dtype"], measured["next_dtype"]) == ("bfloat16", None)
        assert health["dtype_reason"] == "measured on this CPU: 200 GFLOP/s, against 100 in float32"


async def test_a_model_that_is_loaded_later_is_measured_again_too(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others were served while it was measured."""
    monkeypatch.setattr(measuring, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(measuring, "BUSY_PERCENT", 101.0)
    room = 1.5e-9 * (folders[0] / "model.safetensors").stat().st_size
    names = ",".join(map(str, folders))
    async with serving(embed_model=names, max_loaded_gb=room, dtype="float32") as client:
        await costs(client)
        monkeypatch.setattr(measuring, "QUIET_SECONDS", 2.0)  # so that it is seen before
        name = folders[1].name
        assert (await embedded(client, name)).status_code == 200
        found = (await client.get("/capabilities")).json()["forward_passes"]
        [later] = [key for key in found if name in key]
        assert found[later]["provisional"]
        async with asyncio.timeout(60):
            while (await client.get("/capabilities")).json()["forward_passes"][later]["provisional"]:
                await asyncio.sleep(0.02)
