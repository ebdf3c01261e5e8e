"""An application that takes its device for a GPU, beside a stand-in for the driver.

A driver that hangs delays no answer: the GPU's figures are then those of the last reading, marked as stale.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import pytest

from tests.conftest import serving
from tests.hardware import fake_nvml
from tests.hardware.fake_nvml import GB10
from tests.tiny_checkpoints import tiny_bert
from vecmill.app import Server
from vecmill.engine.engine import Engine
from vecmill.hardware import monitor as monitor_module
from vecmill.hardware.memory import DeviceMemory

HELD = DeviceMemory(124_600, 9000, 9200, None, True)
ROUTES = ("/health", "/ready", "/stats", "/stats/detailed", "/capabilities", "/metrics", "/info", "/")
PROMPT_SECONDS = 0.1
SLOW_SECONDS = 2.0  # on a machine that has a lot else to do
HANG_SECONDS = 60.0


@dataclass
class HangingDriver:
    """The part of CUDA that torch asks for memory; it can hang."""

    answers: threading.Event = field(default_factory=threading.Event)
    called: threading.Event = field(default_factory=threading.Event)
    held: DeviceMemory = HELD

    def memory(self) -> DeviceMemory:
        self.called.set()
        assert self.answers.wait(HANG_SECONDS)
        return self.held


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingDriver]:
    """A stand-in for the calls to a GPU's driver, for an application that believes its device to be a GPU."""
    driver = HangingDriver()
    driver.answers.set()
    monkeypatch.setattr(Engine, "memory", lambda engine: driver.memory())
    monkeypatch.setattr(Engine, "gpu_uuid", lambda engine: None)
    monkeypatch.setattr(Server, "_uses_gpu", lambda server: True)
    monkeypatch.setattr(monitor_module, "PERIOD", 0.01)
    monkeypatch.setattr(monitor_module, "FIRST_LOOK_PATIENCE", 0.2)
    yield driver
    driver.answers.set()


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    fake_nvml.load()
    file = tmp_path / "recording.txt"
    answer(file)
    monkeypatch.setenv("FAKE_NVML", str(file))
    yield file
    answer(file)


def hang(recording: Path) -> None:
    recording.write_text(GB10.read_text() + "hang\n")


def answer(recording: Path) -> None:
    recording.write_text(GB10.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "tiny", minilm_folder)


@pytest.fixture
async def client(driver: HangingDriver, recording: Path, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(embed_model=str(folder), max_batch_tokens=64) as client:
        yield client


async def answered(client: httpx.AsyncClient) -> None:
    """Every route that tells of the GPU, and a search."""
    for route in ROUTES:
        seconds = []
        for _ in range(3):
            began = perf_counter()
            assert (await client.get(route)).status_code == 200
            seconds.append(perf_counter() - began)
        assert min(seconds) < PROMPT_SECONDS, route
        assert max(seconds) < SLOW_SECONDS, route
    response = await client.post("/v1/embeddings", json={"input": "a search meanwhile"})
    assert response.status_code == 200


async def gpu(client: httpx.AsyncClient, route: str = "/health") -> tuple[dict[str, Any], dict[str, Any]]:
    body = (await client.get(route)).json()
    return body, body["gpu"]


async def test_a_driver_that_hangs_holds_up_no_answer(
    client: httpx.AsyncClient, driver: HangingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    health, reading = await gpu(client)
    assert (health["cuda_available"], health["gpu_memory_allocated_mb"]) == (True, 9000)
    assert (reading["in_use"], reading["stale"], reading["name"]) == (True, False, "NVIDIA GB10")

    driver.answers.clear()
    driver.called.clear()
    assert driver.called.wait(10)
    await answered(client)
    monkeypatch.setattr(monitor_module, "STALE_SECONDS", 0.05)
    while not (await gpu(client))[1]["stale"]:
        await asyncio.sleep(0.01)
    await answered(client)
    for route in ("/health", "/stats", "/capabilities"):
        body, reading = await gpu(client, route)
        assert (reading["stale"], reading["in_use"], reading["name"]) == (True, True, None)
        assert reading["age_seconds"] >= 0
        assert reading["memory"]["allocated_mb"] == 9000  # of the last reading
        assert "has not answered" in reading["not_available"]["all"]
        if "warnings" in body:
            assert "nvidia-smi" in body["warnings"][0]
    health, _ = await gpu(client)
    assert (health["status"], health["cuda_available"]) == ("ok", True)

    driver.answers.set()
    while (await gpu(client))[1]["stale"]:
        await asyncio.sleep(0.01)
    health, reading = await gpu(client)
    assert (reading["name"], health["warnings"]) == ("NVIDIA GB10", [])


async def test_nvml_that_hangs_holds_up_no_answer(
    client: httpx.AsyncClient, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "STALE_SECONDS", 0.05)
    hang(recording)
    while not (await gpu(client))[1]["stale"]:
        await asyncio.sleep(0.01)
    await answered(client)
    answer(recording)
    while (await gpu(client))[1]["stale"]:
        await asyncio.sleep(0.01)


async def test_a_driver_that_hangs_from_the_start_keeps_nobody_from_starting(
    driver: HangingDriver, recording: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "STALE_SECONDS", 0.05)
    hang(recording)
    driver.answers.clear()
    async with serving(embed_model=str(folder), max_batch_tokens=64) as client:
        health, reading = await gpu(client)
        assert (health["status"], health["cuda_available"], health["gpu_memory_allocated_mb"]) == ("ok", True, None)
        assert (reading["stale"], reading["memory"]["allocated_mb"]) == (True, None)
        await answered(client)
        answer(recording)
        driver.answers.set()


@pytest.mark.parametrize("available_gb", [6, 14, 40])
async def test_the_recommended_batch_is_what_was_found_to_fit(
    driver: HangingDriver, folder: Path, available_gb: int
) -> None:
    """It follows the forward pass that warm-up ran, whatever the card: torch keeps the memory of that pass."""
    driver.held = DeviceMemory(124_600, 9000, 9200, 1024 * available_gb, False)
    settings = {"max_batch_tokens": 1024, "max_batch_ms": 100_000}
    async with serving(embed_model=str(folder), **settings) as client:
        capabilities = (await client.get("/capabilities")).json()
    assert capabilities["gpu_available_mb"] == 1024 * available_gb
    four_passes = 4 * capabilities["max_batch_tokens"] // 128
    assert capabilities["recommended_batch_size"] == max(8, four_passes // 8 * 8)  # a multiple of 8
