"""The engine on a GPU: batches that overlap give the CPU's vectors, compiled or not, and memory ends for real."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.models.loaded import GOLDEN
from vecmill.config import load_settings
from vecmill.core.types import Lane, Prefix, Row
from vecmill.engine.engine import Engine
from vecmill.hardware.gpu import gpu_memory
from vecmill.hardware.memory import meminfo
from vecmill.hardware.nvml import Nvml
from vecmill.models.float8 import (
    Product,
    in_bfloat16,
    product_on,
    round_weight,
    rounded,
    scaled_afterwards,
    scaled_by_row,
)
from vecmill.models.networks import tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Small enough to be in the repository: a GPU machine need have nothing else.
FOLDER = GOLDEN / "qwen3" / "embedding"
KEY = "embed:embedding"
RANDOM = np.random.default_rng(0)


def some_rows(lengths: Iterable[int]) -> list[Row]:
    return [Row(RANDOM.integers(0, 200, length).astype(np.int32)) for length in lengths]


def batch(number: int) -> list[Row]:
    """Large or small, every third with rows that share a prefix."""
    rows = some_rows(RANDOM.integers(1, 64, 30) if number % 4 else RANDOM.integers(1, 9, 3))
    if number % 3 == 0:
        prefix = Prefix(rows[0].token_ids)
        rows += [Row(row.token_ids, prefix=prefix) for row in rows[1:]]
    return rows


BATCHES = [batch(number) for number in range(40)]


@contextmanager
def engine_on(device: str, **flags: object) -> Iterator[Engine]:
    settings = load_settings({"embed_model": str(FOLDER), "rerank_model": "none", "device": device, **flags})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    engine.loaded.result(300)
    yield engine
    engine.close()


async def vectors(engine: Engine) -> np.typing.NDArray[np.float32]:
    lanes = [Lane.INTERACTIVE if number % 3 == 0 else Lane.BULK for number in range(len(BATCHES))]
    results = await asyncio.gather(*(engine.run(KEY, rows, lane) for rows, lane in zip(BATCHES, lanes, strict=True)))
    return np.array([row for result in results for row in result.rows], dtype=np.float32)


def least_cosine(actual: np.typing.NDArray[np.float32], wanted: np.typing.NDArray[np.float32]) -> float:
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(wanted, axis=1)
    return float((np.sum(actual * wanted, axis=1) / norms).min())


@pytest.fixture(scope="module")
def wanted() -> np.typing.NDArray[np.float32]:
    """The vectors of the CPU in float32."""
    with engine_on("cpu", dtype="float32") as engine:
        return asyncio.run(vectors(engine))


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("torch_compile", ["false", "true"])
async def test_batches_that_overlap_give_the_vectors_of_the_cpu(
    wanted: np.typing.NDArray[np.float32], torch_compile: str, cuda_graphs: bool
) -> None:
    with engine_on("cuda", torch_compile=torch_compile, cuda_graphs=cuda_graphs) as engine:
        warmed = engine.loaded.result().warmed[KEY]
        assert warmed.compiled is (torch_compile == "true")
        assert (warmed.graphs > 0) is cuda_graphs
        actual = await vectors(engine)
        assert torch.get_float32_matmul_precision() == "high"
    assert least_cosine(actual, wanted) > 0.998  # what bfloat16 gives on the CPU, too


async def test_a_small_batch_runs_as_a_graph_with_the_vectors_of_a_direct_pass() -> None:
    rows = some_rows((5, 7, 1))
    with engine_on("cuda", torch_compile="false") as engine:
        graphs = engine.loaded.result().models[KEY].graphs
        assert graphs.shape_for(rows) is not None
        in_graph = np.array((await engine.run(KEY, rows, Lane.INTERACTIVE)).rows, dtype=np.float32)
        graphs.passes = {}
        direct = np.array((await engine.run(KEY, rows, Lane.INTERACTIVE)).rows, dtype=np.float32)
    assert least_cosine(in_graph, direct) > 0.9999


async def test_nothing_is_captured_once_the_engine_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_on("cuda", torch_compile="false") as engine:
        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda *_, **__: pytest.fail("captured"))
        await vectors(engine)


def test_a_budget_that_does_not_fit_the_cards_memory_is_lowered_at_warm_up() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()  # the engines of other tests
    torch.cuda.empty_cache()
    fraction = (torch.cuda.memory_reserved(0) + 300e6) / total
    try:
        with engine_on("cuda", max_batch_tokens=1_000_000, memory_fraction=fraction) as engine:
            assert engine.loaded.result().warmed[KEY].calibration.measured[0][0] < 1_000_000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_driver_knows_the_gpu_that_torch_uses() -> None:
    with engine_on("cuda") as engine:
        device, memory = engine.loaded.result().device, engine.memory()
        nvml = Nvml()
        gpu = nvml.read(engine.gpu_uuid())
        nvml.close()
    assert gpu.name == torch.cuda.get_device_name(device)
    reading = gpu_memory(gpu, memory, meminfo(), os.getpid())
    assert reading.unified is bool(torch.cuda.get_device_properties(device).is_integrated)
    assert reading.total_mb is not None
    assert reading.available_mb is not None
    assert 0 < reading.available_mb < reading.total_mb
    assert reading.allocated_mb is not None
    assert 0 < reading.allocated_mb < reading.total_mb


def has_float8() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(0) >= (8, 9)


@pytest.mark.skipif(not torch.cuda.is_available() or not has_float8(), reason="needs compute capability 8.9")
@pytest.mark.parametrize("torch_compile", ["false", "true"])
async def test_fp8_gives_the_vectors_of_bfloat16_nearly(
    wanted: np.typing.NDArray[np.float32], torch_compile: str
) -> None:
    with engine_on("cuda", dtype="fp8", torch_compile=torch_compile) as engine:
        card = engine.loaded.result().models[KEY].card
        actual = await vectors(engine)
    assert card.dtype == "fp8"
    assert "no faster" not in card.dtype_reason, "the card has a kernel, and it is not used"
    assert least_cosine(actual, wanted) > 0.95  # of a tiny model of random weights


@pytest.mark.skipif(not torch.cuda.is_available() or not has_float8(), reason="needs compute capability 8.9")
@pytest.mark.parametrize("product", [scaled_by_row, scaled_afterwards])
@pytest.mark.parametrize("shape", [(1, 64, 32), (17, 2560, 6144), (4096, 1024, 3072)])
def test_a_kernel_for_float8_gives_the_numbers_of_bfloat16(product: Product, shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    device = torch.device("cuda", 0)
    if product is scaled_by_row and product_on(device) is not scaled_by_row:
        pytest.skip("the card's kernels do not scale by row")
    values, scales = rounded(torch.randn(tokens, inputs, device=device))
    weight, weight_scales = round_weight(torch.randn(outputs, inputs, device=device))
    bias = torch.randn(outputs, device=device).bfloat16()
    given = (values, weight, scales, weight_scales, bias)
    found, exact = product(*given).float(), in_bfloat16(*given).float()
    assert (found - exact).norm() < 0.01 * exact.norm()


async def test_a_model_wakes_with_the_same_vectors_and_sleeps_off_the_card() -> None:
    if torch.cuda.get_device_properties(0).is_integrated:
        pytest.skip("the card has no memory of its own")
    with engine_on("cuda", torch_compile="false", sleep_gb=1) as engine:
        before, model = await vectors(engine), engine.loaded.result().models[KEY].model
        engine.unload(KEY, sleep=True).result(60)
        assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}
        assert engine.asleep[KEY] > 0
        engine.load(KEY, lambda percent, message: None).result(120)
        assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cuda"}
        assert not engine.asleep
        assert least_cosine(await vectors(engine), before) > 0.999999
