"""The probes of the doctor on the device that is here; those of a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from vecmill.engine.probes.allocation import allocation
from vecmill.engine.probes.attention import attention
from vecmill.engine.probes.build import claimed_memory, torch_build
from vecmill.engine.probes.compiling import compiling
from vecmill.engine.probes.matmul import load, matmul_speed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_packed_attention_of_a_cpu_is_sdpa() -> None:
    result = attention("cpu")
    assert (result.varlen, result.dtype) == (False, "float32")
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5


def test_the_build_is_this_torch() -> None:
    build = torch_build("cpu")
    assert (build.version, build.cuda) == (str(torch.__version__), torch.version.cuda)
    assert len(build.gpus) == torch.cuda.device_count()


@pytest.mark.gpu
@needs_gpu
def test_an_oversized_allocation_is_refused_and_the_device_works_on() -> None:
    result = allocation("cuda:0")
    assert (result.refused, result.works_after) == ("OutOfMemoryError", True)
    assert result.seconds < 5
    assert torch.empty(int(1.05 * result.cap), dtype=torch.uint8, device="cuda").numel()  # the cap is gone


@pytest.mark.gpu
@needs_gpu
def test_varlen_attention_is_sdpa_and_faster_than_row_by_row() -> None:
    result = attention("cuda:0")
    assert (result.varlen, result.dtype) == (True, "bfloat16")
    assert result.largest_difference is not None
    assert result.largest_difference < 0.05
    assert result.speedup > 1


@pytest.mark.gpu
@needs_gpu
def test_matrix_products_of_a_gpu() -> None:
    speed, under_load = matmul_speed("cuda:0"), load("cuda:0")
    assert speed.size == 4096
    assert speed.median > 1
    assert under_load.seconds >= 5
    assert under_load.tflops == pytest.approx(speed.median, rel=0.5)


@pytest.mark.gpu
@needs_gpu
def test_compiling_for_a_gpu() -> None:
    assert compiling("cuda:0").largest_difference == pytest.approx(0, abs=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_what_cuda_says_of_the_gpu() -> None:
    build, memory = torch_build("cuda:0"), claimed_memory("cuda:0")
    assert build.gpus[0].name == torch.cuda.get_device_name(0)
    assert build.arch_list
    assert 0 < memory.free <= memory.total
