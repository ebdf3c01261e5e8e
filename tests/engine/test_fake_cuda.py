"""The CUDA branches without a GPU: every family on fake CUDA tensors, which have shapes, types and devices, no values.

What is caught: a wrong device, type or shape; an argument that this torch's `varlen_attn` does not have; any step that
would make the host wait for the device (a fake tensor has no value to give).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.loaded import GOLDEN, load_model
from tests.tiny_checkpoints import tiny_bert, tiny_cross_encoder, tiny_nomic, tiny_xlm_roberta
from vecmill.core.types import Prefix, Row, Task
from vecmill.models.packing import pack
from vecmill.models.prefix_memory import PrefixMemory
from vecmill.models.registry import FAMILIES

Family = tuple[Task, str]
CUDA = torch.device("cuda", 0)
EVERY_FAMILY: list[Any] = [
    pytest.param((task, model_type), id=f"{task}-{model_type}") for task in Task for model_type in FAMILIES[task]
]
# Copies from the host inside a forward pass; from pageable memory they wait for all that was launched before.
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::lift_fresh_copy"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Callable[[Family], Path]:
    root = tmp_path_factory.mktemp("families")
    makers: dict[Family, Callable[[], Path]] = {
        (Task.EMBED, "bert"): lambda: tiny_bert(root / "bert", minilm_folder),
        (Task.EMBED, "xlm-roberta"): lambda: tiny_xlm_roberta(root / "xlm-roberta"),
        (Task.EMBED, "nomic_bert"): lambda: tiny_nomic(root / "nomic", minilm_folder),
        (Task.EMBED, "qwen3"): lambda: GOLDEN / "qwen3" / "embedding",
        (Task.EMBED, "nvembed"): lambda: GOLDEN / "nvembed" / "checkpoint",
        (Task.RERANK, "bert"): lambda: tiny_cross_encoder(root / "ce", kind="bert", tokenizer_from=minilm_folder),
        (Task.RERANK, "xlm-roberta"): lambda: tiny_cross_encoder(root / "xlm-ce", kind="xlm-roberta"),
        (Task.RERANK, "qwen3"): lambda: GOLDEN / "qwen3" / "reranker",
    }
    return cache(lambda family: makers[family]())


class Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation, and the copies from the host among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.from_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.operations.append(name)
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if name in COPIES and isinstance(out, torch.Tensor) and out.is_cuda and any(not t.is_cuda for t in tensors):
            self.from_host.append(name)
        return out


def getitem(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """Indexing by operations: a build for the CPU has no device guard for it."""
    dimension = 0
    indices: list[Tensor | None] = []
    keys = key if isinstance(key, tuple) else (key,)
    for position, each in enumerate(keys):
        if each is Ellipsis:
            later = [one for one in keys[position + 1 :] if one is not None]
            dimension = tensor.dim() - len(later)
            continue
        if each is None:
            tensor, dimension = tensor.unsqueeze(dimension), dimension + 1
        elif isinstance(each, slice):
            start, end = each.start or 0, tensor.shape[dimension] if each.stop is None else each.stop
            tensor, dimension = torch.ops.aten.slice.Tensor(tensor, dimension, start, end), dimension + 1
        elif isinstance(each, torch.Tensor):
            indices += [None] * (dimension - len(indices)) + [each]
            dimension += 1
        else:
            tensor = torch.ops.aten.select.int(tensor, dimension, each)
    return torch.ops.aten.index.Tensor(tensor, indices) if indices else tensor


@pytest.fixture(autouse=True)
def indexing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        monkeypatch.setattr(FakeTensor, "__getitem__", getitem, raising=False)


def move(value: Any, mode: FakeTensorMode) -> Any:
    """A tensor as a fake one on CUDA."""
    with mode:
        fake = mode.from_tensor(value.detach()).to(CUDA)
    return nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake


def to_fake_cuda(model: Any, mode: FakeTensorMode) -> None:
    """Every weight and buffer of a model that was loaded on the CPU."""
    for owner in (model, *(each for module in model.modules for each in module.modules())):
        places = [vars(owner)]
        if isinstance(owner, nn.Module):
            places += [owner._parameters, owner._buffers]
        for place in places:
            for name, value in list(place.items()):
                if isinstance(value, torch.Tensor):
                    place[name] = move(value, mode)


@contextmanager
def fake_cuda(model: Any) -> Iterator[FakeTensorMode]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake_cuda(model, mode)
    with mode, torch.inference_mode():
        yield mode


def rows_of(family: Family, vocab_size: int) -> list[Row]:
    random = np.random.default_rng(0)
    rows = []
    for length in (1, 3, 33, 33, 60):
        token_ids = random.integers(0, vocab_size, length).astype(np.int32)
        rows.append(
            Row(
                token_ids,
                unpooled=length // 2 if family[1] == "nvembed" else 0,
                second_text=length // 2 if family == (Task.RERANK, "bert") else None,
            )
        )
    if family[1] == "qwen3":
        prefix = Prefix(rows[-1].token_ids)
        rows += [Row(one.token_ids, prefix=prefix) for one in rows[:3]]
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "sdpa"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_forward_pass_on_cuda_never_waits(
    folder_of: Callable[[Family], Path], family: Family, flash: bool, dtype: torch.dtype
) -> None:
    _, model = load_model(folder_of(family), family[0], dtype)
    rows = rows_of(family, model.vocab_size)
    with fake_cuda(model):
        packed = pack(rows, CUDA)
        with Log() as log:
            answers = model.forward(packed, use_flash_attn=flash)
    assert answers.device == CUDA
    assert answers.dtype is torch.float32
    assert answers.shape == (len(rows), model.width)
    assert log.from_host == []
    attention = sum(name == "torch_attn::_varlen_attn" for name in log.operations)
    assert attention == (len(model.layers) if flash and dtype is torch.bfloat16 else 0)


@pytest.mark.parametrize("recalled", [False, True], ids=["new", "recalled"])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "sdpa"])
@pytest.mark.parametrize("task", list(Task))
def test_a_pass_with_prefixes_never_waits(
    folder_of: Callable[[Family], Path], task: Task, flash: bool, recalled: bool
) -> None:
    _, model = load_model(folder_of((task, "qwen3")), task, torch.bfloat16)
    rows = rows_of((task, "qwen3"), model.vocab_size)
    memory = PrefixMemory()
    with fake_cuda(model):
        for number in range(2 if recalled else 1):
            packed = pack(rows, CUDA, memory)
            assert bool(packed.recalled) is (number == 1)
            with Log() as log:
                answers = model.forward(packed, use_flash_attn=flash)
            for new in packed.new_prefixes:
                memory.keep(new.prefix, new.layers)
            assert answers.device == CUDA
            assert log.from_host == []


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_one_copy_brings_a_batch_to_the_device(folder_of: Callable[[Family], Path], family: Family) -> None:
    _, model = load_model(folder_of(family), family[0], torch.bfloat16)
    with fake_cuda(model):
        with Log() as log:
            packed = pack(rows_of(family, model.vocab_size), CUDA)
        assert all(
            each.device == CUDA
            for each in (packed.input_ids, packed.position_ids, packed.token_type_ids, packed.cu_seqlens, packed.last)
        )
    assert len(log.from_host) == 1


def test_the_answers_are_waited_for_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """DEVICE=cuda:1: an event on the current device's stream (cuda:0) is done before the copy is."""
    from unittest.mock import MagicMock

    from vecmill.engine import forward

    asked: list[Any] = []
    recorded: list[Any] = []
    answers = MagicMock(is_cuda=True, shape=(2, 3), dtype=torch.float32, device=torch.device("cuda", 1))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: MagicMock())

    def current_stream(device: torch.device | None = None) -> str:
        asked.append(device)
        return "stream"

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    event = MagicMock(record=lambda stream=None: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    forward._to_host(answers)
    assert recorded == ["stream"]
    assert asked == [answers.device]


def test_attention_runs_on_the_oldest_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's `varlen_attn` has neither enable_gqa nor num_splits."""
    import importlib

    from torch.nn.attention import varlen

    from vecmill.models import packed_attention

    def of_2_11(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return torch.zeros_like(query)

    batch = pack([Row(np.zeros(5, dtype=np.int32))] * 2, torch.device("cpu"))
    query, key = torch.zeros(1, 4, 16, 8), torch.zeros(1, 2, 16, 8)
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", of_2_11)
        module = importlib.reload(packed_attention)
        assert module._flash(query, key, key, batch, None, True).shape == (1, 16, 4, 8)
    importlib.reload(packed_attention)
