"""The engine on a GPU: batches that overlap give the CPU's vectors, compiled or not, and memory ends for real."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import tiny_bert
from vecmill.config import load_settings
from vecmill.core.types import Lane, Row
from vecmill.engine.engine import Engine
from vecmill.hardware.gpu_memory import gpu_memory
from vecmill.hardware.meminfo import meminfo
from vecmill.hardware.nvml import Nvml

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KEY = "embed:tiny"
RANDOM = np.random.default_rng(0)
BATCHES = [
    [Row(RANDOM.integers(1000, 20_000, length).astype(np.int32)) for length in RANDOM.integers(1, 64, 30)]
    for _ in range(20)
]


@contextmanager
def engine_on(device: str, folder: Path, **flags: object) -> Iterator[Engine]:
    settings = load_settings({"embed_model": str(folder), "device": device, **flags})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    engine.loaded.result(300)
    yield engine
    engine.close()


@pytest.fixture
def folder(tmp_path: Path, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path / "tiny", minilm_folder)


async def vectors(engine: Engine) -> np.typing.NDArray[np.float32]:
    lanes = [Lane.INTERACTIVE if number % 3 == 0 else Lane.BULK for number in range(len(BATCHES))]
    results = await asyncio.gather(*(engine.run(KEY, rows, lane) for rows, lane in zip(BATCHES, lanes, strict=True)))
    return np.array([row for result in results for row in result.rows], dtype=np.float32)


@pytest.mark.parametrize("torch_compile", ["false", "true"])
async def test_batches_that_overlap_give_the_vectors_of_the_cpu(folder: Path, torch_compile: str) -> None:
    with engine_on("cpu", folder, dtype="float32") as engine:
        wanted = await vectors(engine)
    with engine_on("cuda", folder, torch_compile=torch_compile) as engine:
        assert engine.loaded.result().warmed[KEY].compiled is (torch_compile == "true")
        found = await vectors(engine)
        assert torch.get_float32_matmul_precision() == "high"
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    assert (np.sum(found * wanted, axis=1) / norms).min() > 0.999


def test_a_budget_that_does_not_fit_the_cards_memory_is_lowered_at_warm_up(folder: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        with engine_on("cuda", folder, max_batch_tokens=1_000_000, memory_fraction=300e6 / total) as engine:
            assert engine.loaded.result().warmed[KEY].calibration.measured[0][0] < 1_000_000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_driver_knows_the_gpu_that_torch_uses(folder: Path) -> None:
    with engine_on("cuda", folder) as engine:
        device, memory = engine.loaded.result().device, engine.memory()
        nvml = Nvml()
        gpu = nvml.read(engine.gpu_uuid())
        nvml.close()
    assert gpu.name == torch.cuda.get_device_name(device)
    found = gpu_memory(gpu, memory, meminfo(), os.getpid())
    assert found.unified is bool(torch.cuda.get_device_properties(device).is_integrated)
    assert found.total_mb is not None
    assert found.available_mb is not None
    assert 0 < found.available_mb < found.total_mb
    assert found.allocated_mb is not None
    assert 0 < found.allocated_mb < found.total_mb
