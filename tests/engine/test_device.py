"""What is asked of a GPU and done with the answers, by a stand-in for torch's questions to it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny_checkpoints import tiny_bert
from vecmill.config import load_settings
from vecmill.core.errors import StartupError, is_out_of_memory
from vecmill.engine import device as device_module
from vecmill.engine import loader
from vecmill.engine.device import (
    choose_dtype,
    configure_device,
    device_memory,
    limit_memory,
    unless_out_of_memory,
)
from vecmill.engine.forward import Streams
from vecmill.engine.loader import Loaded
from vecmill.hardware.memory import GIGABYTE, GpuRoom
from vecmill.models.packing import Attention

SECOND = torch.device("cuda", 1)
GB10_TOTAL = int(121.7 * GIGABYTE)
FLOOR = 0.04 * GB10_TOTAL


@dataclass
class Card:
    """The second of two cards, as far as torch tells; the first is the current one unless it is said otherwise."""

    capability: tuple[int, int] = (12, 1)
    integrated: bool = True
    total: int = GB10_TOTAL
    available: float = 60 * GIGABYTE
    reserved: int = 0
    fractions: list[float] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def ask(self, name: str, answer: Callable[[], Any]) -> Callable[[Any], Any]:
        def asked(device: Any) -> Any:
            assert torch.device(device) == SECOND, f"{name} asks another card"
            self.calls.append(name)
            return answer()

        return asked

    @property
    def limits(self) -> list[float]:
        """Gigabytes, each time that a bound was set."""
        return [round(fraction * self.total / GIGABYTE, 1) for fraction in self.fractions]


def cudnn() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    answers: dict[str, Callable[[], Any]] = {
        "set_device": lambda: None,
        "get_device_properties": lambda: SimpleNamespace(
            total_memory=card.total, is_integrated=int(card.integrated), uuid="0", name="a card"
        ),
        "get_device_capability": lambda: card.capability,
        "get_device_name": lambda: "a card",
        "mem_get_info": lambda: (int(card.available), card.total),
        "memory_allocated": lambda: card.reserved,
        "memory_reserved": lambda: card.reserved,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, card.ask(name, answer))

    def bound(fraction: float, device: Any) -> None:
        assert device == SECOND
        assert 0 <= fraction <= 1
        card.fractions.append(fraction)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", bound)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(device_module, "meminfo", lambda: {"MemAvailable": int(card.available)})
    monkeypatch.setattr(loader, "choose_device", lambda wanted: SECOND)
    monkeypatch.setattr(Streams, "on", lambda device: None)
    precision, enabled = torch.get_float32_matmul_precision(), cudnn()
    yield card
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(enabled)


@pytest.fixture
def folder(tmp_path: Path, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path / "tiny", minilm_folder)


def load(folder: Path, **flags: object) -> Loaded:
    settings = load_settings({"embed_model": str(folder), "device": "cuda:1", **flags})
    return loader.load(settings.model, settings.engine, lambda percent, message: None)


def room(**changes: Any) -> GpuRoom:
    values = {
        "total": 100 * GIGABYTE,
        "reserved": 0,
        "available": 100 * GIGABYTE,
        "floor": 0,
        "fraction": 0.9,
        "unified": True,
    }
    return GpuRoom(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "limit_gb"),
    [
        ({}, 90),  # all of it is free: MEMORY_FRACTION
        ({"available": 60 * GIGABYTE, "floor": 8 * GIGABYTE}, 52),  # the rest is somebody else's
        ({"available": 60 * GIGABYTE, "floor": 8 * GIGABYTE, "reserved": 20 * GIGABYTE}, 72),  # beside what it holds
        ({"available": 5 * GIGABYTE, "floor": 8 * GIGABYTE}, 0),
        ({"available": 5 * GIGABYTE, "floor": 8 * GIGABYTE, "reserved": 20 * GIGABYTE}, 17),  # nothing more
        ({"available": 60 * GIGABYTE, "fraction": 0.3}, 30),
        ({"available": 10 * GIGABYTE, "unified": False}, 90),  # a card of its own refuses by itself
    ],
)
def test_what_torch_may_hold_of_a_gpu(changes: dict[str, Any], limit_gb: int) -> None:
    assert room(**changes).limit == limit_gb * GIGABYTE


def test_what_does_not_fit_is_a_sentence() -> None:
    here = room(available=60 * GIGABYTE, floor=8 * GIGABYTE)
    assert here.shortage(52 * GIGABYTE) is None
    said = here.shortage(53 * GIGABYTE)
    assert said is not None
    assert "53.0 GB" in said
    assert "60.0 are available, 8.0 of which must stay free (MEMORY_FLOOR_GB)" in said
    small = room(available=10 * GIGABYTE, unified=False)
    assert small.shortage(10 * GIGABYTE) is None
    assert "the GPU has 10.0 are available;" in str(small.shortage(11 * GIGABYTE))
    assert "MEMORY_FRACTION" in str(room(fraction=0.1).shortage(11 * GIGABYTE))


def test_a_gpu_that_shares_the_machines_memory_is_bounded_by_what_is_available(card: Card) -> None:
    configure_device(SECOND, 0.9)
    assert card.limits == [round((60 * GIGABYTE - FLOOR) / GIGABYTE, 1)]
    assert "mem_get_info" not in card.calls  # it takes the page cache for used
    card.available = 119 * GIGABYTE
    limit_memory(SECOND, 0.9, None)
    assert card.limits[-1] == round(0.9 * GB10_TOTAL / GIGABYTE, 1)
    card.available, card.reserved = 20 * GIGABYTE, 30 * GIGABYTE
    limit_memory(SECOND, 0.9, 8)
    assert card.limits[-1] == 42
    card.available = 1 * GIGABYTE
    limit_memory(SECOND, 0.9, 40)
    assert card.limits[-1] == 0
    assert limit_memory(torch.device("cpu"), 0.9, None) is None


def test_sdpa_keeps_off_cudnn(card: Card) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    configure_device(torch.device("cpu"), 0.9)
    assert cudnn()
    configure_device(SECOND, 0.9)
    assert not cudnn()
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    assert torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("integrated", [True, False])
def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch, integrated: bool
) -> None:
    card.integrated, card.available = integrated, FLOOR * integrated + 500_000
    monkeypatch.setattr(loader, "load_all", lambda *_, **__: pytest.fail("they are read"))
    with pytest.raises(StartupError, match=r"The weights of tiny do not fit: they take .* are available.*smaller"):
        load(folder)
    assert card.limits[-1] == (0 if integrated else round(0.9 * GB10_TOTAL / GIGABYTE, 1))


def test_the_bound_is_set_anew_before_each_warm_up(card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest text and the largest batch are tried within what others have left meanwhile."""
    models = [SimpleNamespace(card=SimpleNamespace(id=key, key=key), key=key) for key in ("one", "other")]
    tried: list[float] = []

    def load_all(*_: object, **__: object) -> list[Any]:
        card.reserved, card.available = 10 * GIGABYTE, 30 * GIGABYTE
        return models

    def warm_up(*_: object, **__: object) -> str:
        tried.append(card.limits[-1])
        card.available = 12 * GIGABYTE  # vLLM starts
        return "warmed"

    monkeypatch.setattr(loader, "load_all", load_all)
    monkeypatch.setattr(loader, "warm_up", warm_up)
    load(folder)
    floor = FLOOR / GIGABYTE
    assert tried == [round(40 - floor, 1), round(22 - floor, 1)]


@pytest.mark.parametrize(
    ("capability", "built", "flash"),
    [((7, 5), True, False), ((8, 0), True, True), ((8, 9), True, True), ((12, 1), True, True), ((9, 0), False, False)],
)
def test_flash_attention_is_chosen_once_by_what_the_card_can(
    card: Card,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    built: bool,
    flash: bool,
) -> None:
    card.capability = capability
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(
        loader, "load_model", lambda *_: SimpleNamespace(width=1, vocab_size=1, modules=(), largest_head=1)
    )
    warmed: list[Attention] = []
    monkeypatch.setattr(loader, "warm_up", lambda model, *_, **__: warmed.append(model.attention))
    load(folder, dtype="float16")
    load(folder, dtype="float16", use_flash_attn=False)
    load(folder, dtype="float32")
    assert warmed == [Attention.FLASH if flash else Attention.SDPA, Attention.SDPA, Attention.SDPA]


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 6), torch.bfloat16)])
def test_the_dtype_is_by_the_card_in_use(card: Card, capability: tuple[int, int], dtype: torch.dtype) -> None:
    card.capability = capability
    assert choose_dtype("auto", SECOND, 32).dtype is dtype


@pytest.mark.parametrize(("capability", "has"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 1), True)])
def test_fp8_is_for_cards_that_multiply_in_it(card: Card, capability: tuple[int, int], has: bool, folder: Path) -> None:
    card.capability = capability
    if has:
        chosen = choose_dtype("fp8", SECOND, 32)
        assert (chosen.dtype, chosen.name) == (torch.bfloat16, "fp8")
        return
    with pytest.raises(StartupError, match=r"8\.9 or newer .*cuda:1 \(a card\) is of 8\.6: set DTYPE to auto"):
        load(folder, dtype="fp8")


def test_torchs_counters_are_read_after_its_allocator_has_answered(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for its lock with all of Python stopped; an allocation waits for it alone."""
    monkeypatch.setattr(torch, "empty", lambda size, device: card.ask("empty", lambda: None)(device))
    memory = device_memory(SECOND)
    assert memory is not None
    assert (memory.unified, memory.reported_free_mb) == (True, None)
    assert card.calls.index("empty") < card.calls.index("memory_allocated")


OUT_OF_MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cudaMalloc failed: out of memory"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("cudaErrorMemoryAllocation"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1131, please report a bug'),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB)."),
    RuntimeError("Invalid buffer size: 14.5 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("could not create a primitive descriptor for a matmul"),
]
OTHERS: list[Exception] = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("FlashAttention only supports Ampere GPUs or newer."),
    RuntimeError("out of resource: shared memory, Required: 114688, Hardware limit: 101376"),
    ValueError("out of memory is the title of this document"),
    OSError(errno.ENOENT, "No such file"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_a_lack_of_memory_is_known_in_every_wording(error: Exception) -> None:
    def fail() -> None:
        raise error

    def fail_wrapped() -> None:
        try:
            fail()
        except Exception as cause:
            raise RuntimeError("backend failed") from cause

    assert unless_out_of_memory(fail) is None
    assert unless_out_of_memory(fail_wrapped) is None


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_less_at_once_does_not_mend_is_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_memory_that_ends_while_weights_are_read_is_a_sentence(
    card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_all(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(loader, "load_all", load_all)
    with pytest.raises(StartupError, match=r"weights do not fit into the memory of cuda:1 \(a card\): CUDA error"):
        load(folder)
