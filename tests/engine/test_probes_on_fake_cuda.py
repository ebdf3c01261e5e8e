"""The doctor's probes on a GPU, without one: fake CUDA tensors, and stand-ins for what torch asks a driver.

Fake tensors have no values: the tests see that the probes use the right card and the right types, and give its memory
back; not what they measure.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.engine.test_fake_cuda import CudaDriver, getitem
from vecmill.engine.probes import matmul
from vecmill.engine.probes.allocation import allocation
from vecmill.engine.probes.attention import attention
from vecmill.engine.probes.build import claimed_memory, torch_build
from vecmill.engine.probes.matmul import load, matmul_speed

pytestmark = pytest.mark.slow

GIGABYTE = 1 << 30
SECOND = "cuda:1"


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that are waited for."""
    devices: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: devices.append(str(device)))
    return devices


def answer(monkeypatch: pytest.MonkeyPatch, name: str, value: Callable[[Any], Any]) -> None:
    monkeypatch.setattr(torch.cuda, name, value)


def test_products_are_of_the_cards_size_and_waited_for_on_it(
    synchronized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(matmul, "LOAD_SECONDS", 0.05)
    monkeypatch.setattr(matmul, "CUDA_TIMING_SECONDS", 0.005)

    def multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
        assert {str(each.device) for each in (left, right, out)} == {SECOND}
        assert {each.shape for each in (left, right, out)} == {(4096, 4096)}
        assert {each.dtype for each in (left, right, out)} == {torch.bfloat16}

    monkeypatch.setattr(torch, "matmul", multiply)
    with FakeTensorMode(), CudaDriver() as driver:
        speed = matmul_speed(SECOND)
        loaded = load(SECOND)
    assert (speed.device, speed.dtype, speed.size, len(speed.tflops)) == (SECOND, "bfloat16", 4096, matmul.TIMINGS)
    assert loaded.seconds >= 0.05
    assert set(synchronized) == {SECOND}
    assert driver.from_host == []


@pytest.mark.parametrize(
    ("capability", "dtype", "varlen"),
    [
        ((12, 1), "bfloat16", True),
        pytest.param((9, 0), "bfloat16", True, marks=pytest.mark.nightly),
        pytest.param((7, 5), "float32", False, marks=pytest.mark.nightly),
    ],
)
def test_attention_is_compared_in_what_the_card_has(
    synchronized: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: str,
    varlen: bool,
) -> None:
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        monkeypatch.setattr(FakeTensor, "__getitem__", getitem, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(Tensor, "item", lambda tensor: 0.0)  # a fake tensor has no value to give
    answer(monkeypatch, "get_device_capability", lambda device: capability if str(device) == SECOND else (5, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), CudaDriver() as driver:
        result = attention(SECOND)
    assert (result.dtype, result.varlen, result.rows) == (dtype, varlen, 72)
    assert (driver.count("torch_attn::_varlen_attn") > 0) is varlen
    assert set(synchronized) == {SECOND}


def test_the_cards_are_told_as_nvml_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        SimpleNamespace(name="NVIDIA L4", major=8, minor=9, uuid="11111111-2222", is_integrated=0),
        SimpleNamespace(name="NVIDIA GB10", major=12, minor=1, uuid="GPU-33333333", is_integrated=1),
    ]

    def properties(device: Any) -> Any:
        return cards[torch.device("cuda", device).index if isinstance(device, int) else torch.device(device).index]

    answer(monkeypatch, "is_available", lambda: True)  # type: ignore[arg-type, misc]
    answer(monkeypatch, "device_count", lambda: 2)  # type: ignore[arg-type, misc]
    answer(monkeypatch, "get_arch_list", lambda: ["sm_80", "sm_120"])  # type: ignore[arg-type, misc]
    answer(monkeypatch, "get_device_properties", properties)
    answer(monkeypatch, "mem_get_info", lambda device: (torch.device(device).index * GIGABYTE, 121 * GIGABYTE))
    build = torch_build("cpu")
    assert [(gpu.name, gpu.capability, gpu.uuid) for gpu in build.gpus] == [
        ("NVIDIA L4", (8, 9), "GPU-11111111-2222"),
        ("NVIDIA GB10", (12, 1), "GPU-33333333"),
    ]
    assert (build.arch_list, build.cuda_error) == (("sm_80", "sm_120"), None)
    claimed = claimed_memory(SECOND)
    assert (claimed.free, claimed.total, claimed.integrated) == (GIGABYTE, 121 * GIGABYTE, True)


def test_why_cuda_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    build = torch_build("cpu")
    assert (build.gpus, build.arch_list) == ((), ())
    assert build.cuda_error == "The NVIDIA driver on your system is too old (found version 12040)."


@pytest.mark.parametrize("refuses", [True, False])
def test_an_allocation_above_the_cap_is_asked_for_and_the_cap_taken_back(
    synchronized: list[str], monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """On a stand-in for the allocator that keeps to the cap, and on one that does not."""
    total = 8 * GIGABYTE
    fractions: list[float] = []
    emptied: list[int] = []

    def empty(size: int, **_: object) -> object:
        if refuses and size > fractions[-1] * total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.10 GiB.")
        return object()

    monkeypatch.setattr(torch, "empty", empty)
    answer(monkeypatch, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    result = allocation("cpu")  # the matrices of the last step are real ones
    assert result.refused == ("OutOfMemoryError" if refuses else None)
    assert (result.cap, result.requested, result.works_after) == (GIGABYTE, int(1.1 * GIGABYTE), True)
    assert fractions == [1 / 8, 1.0]
    assert len(emptied) == 2
