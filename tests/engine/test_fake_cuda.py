"""The CUDA branches without a GPU: every family on fake CUDA tensors, which have shapes, types and devices, no values.

What is caught: a wrong device, type or shape; an argument that this torch's `varlen_attn` does not have; any step that
would make the host wait for the device (a fake tensor has no value to give); a copy or a kernel on the wrong stream.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.families import TinyModel, every_family, tiny_model
from tests.models.loaded import GOLDEN, load_model
from tests.tiny_checkpoints import edit_json
from vecmill.core.types import Lane, Prefix, Row, Task
from vecmill.engine.compilation import compilations, compile_layers
from vecmill.engine.cuda_graphs import CudaCapture, Graphs, shape_of
from vecmill.engine.forward import Device, Launched, LoadedModel, Streams, launch
from vecmill.engine.loader import attention_of
from vecmill.models import float8, packed_attention
from vecmill.models.float8 import Float8Linear, Product, to_float8
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PrefixMemory, pack

pytestmark = pytest.mark.slow

# A CUDA build of torch without a card gets a stand-in for the card's driver from the first mode of the process. In
# torch 2.11 the stand-in goes with the thread that made it, and the next mode crashes: so it is made here, in the main
# thread, and not in one that compiles layers in another test, which ends.
with FakeTensorMode():
    pass

# Not the first: what is made on "cuda" without a number is on that one, and does not fit.
CUDA = torch.device("cuda", 1)
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::lift_fresh_copy"}
COMPUTING = {"aten::embedding", "aten::linear", "aten::segment_reduce", "torch_attn::_varlen_attn"}
COMPUTING |= {"aten::scaled_dot_product_attention"}
LAYERS_OF_OTHERS = ("camembert", "xlm-roberta", "roberta", "distilbert", "electra", "qwen2", "mistral", "ministral3")
"""Families whose layers are, but for names and numbers, those of bert or llama."""
CAPTURED_EVERY_TIME = (
    *("embed-bert-heads", "embed-jina_embeddings_v3", "embed-modernbert", "embed-nomic_bert-mixture", "embed-nvembed"),
    *("embed-qwen3", "embed-static_embedding", "rerank-bert", "rerank-qwen3-two-labels"),
)
"""One for each kind of layers and of heads. That no family's pass waits for the host is seen where it is launched."""


def at_night(each: Any) -> Any:
    """The mark of a family whose layers are those of another one."""
    return pytest.mark.nightly if each.values[0].model_type in LAYERS_OF_OTHERS else ()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], Path]:
    root = tmp_path_factory.mktemp("families")
    return cache(lambda tiny: tiny.write(root / str(tiny)))


@dataclass
class Stream:
    """A stand-in for a CUDA stream."""

    driver: CudaDriver
    device: torch.device
    priority: int = 0
    waited_for: list[Event] = field(default_factory=list)

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "an event that was never recorded is waited for"
        self.waited_for.append(event)
        self.driver.steps.append(Step("wait", self))

    def synchronize(self) -> None:
        self.driver.waits.append("Stream.synchronize")


class Event:
    """A stand-in for a CUDA event."""

    def __init__(self, driver: CudaDriver, **_: Any) -> None:
        self._driver = driver
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self._driver.current_stream()
        self._driver.steps.append(Step("record", self.stream))

    def synchronize(self) -> None:
        self._driver.waits.append("Event.synchronize")


class Graph:
    """A stand-in for a CUDA graph: what is captured runs at once, on fake tensors."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self.stream: Stream | None = None

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.stream = self._driver.current_stream()
        self._driver.steps.append(Step("capture", self.stream))

    def capture_end(self) -> None:
        self._driver.steps.append(Step("captured", self._driver.current_stream()))

    def replay(self) -> None:
        assert self._driver.current_stream() is self.stream, "replayed on another stream than it was captured on"
        self._driver.steps.append(Step("replay", self._driver.current_stream()))


@dataclass(frozen=True)
class Step:
    """One operation, and the stream that it was launched on."""

    name: str
    stream: Stream
    blocking: bool = False
    """A copy that the host waits for: not asked to be asynchronous, or its side on the host is not pinned."""
    window: Any = None
    """Of attention."""


class CudaDriver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation with its stream, the copies among them, and what the host would wait for."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Or dynamo would run compiled layers as they are written."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.from_host: list[Step] = []
        self.to_host: list[Step] = []
        self.waits: list[str] = []
        self.devices: set[torch.device] = set()
        self.present = False
        """Whether there is a card now: while dynamo traces, it must not look for one."""
        self._pinned: list[Tensor] = []
        self._default = Stream(self, torch.device("cuda", 0))
        self._current = [self._default]

    def __enter__(self) -> CudaDriver:
        self.present = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.present = False

    def forget(self) -> None:
        """All steps so far."""
        for each in (self.steps, self.from_host, self.to_host, self.waits, self._pinned):
            each.clear()

    def count(self, name: str) -> int:
        """Steps of this name."""
        return sum(step.name == name for step in self.steps)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """On the device, by default the current one."""
        stream = self._current[-1]
        return self._default if device is not None and device != stream.device else stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        yield
        self._current.pop()

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned.append(tensor)
        return tensor

    def empty(self, *sizes: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        """torch.empty; a build for the CPU cannot pin."""
        made = EMPTY(*sizes, **kwargs)
        return self.pin(made) if pin_memory else made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "vecmill::packed_attention":  # a fake tensor's stops at its shape
            with self:
                query, key, value, *others = args
                return packed_attention._attend(query, key, value, packed_attention.compiled_call.get(), *others)
        out = func(*args, **(kwargs or {}))
        window = next((list(each) for each in args if isinstance(each, list | tuple)), None)
        self.steps.append(Step(name, self.current_stream(), window=window))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.devices |= {each.device for each in (*given, *made) if each.is_cuda}
        # A number (no dimensions) on the host goes to the device as an argument of a kernel.
        on_host = [each for each in given if not each.is_cuda and (each.dim() or name in COPIES)]
        if name == "aten::copy_":
            on_host, given, made = [each for each in given[1:] if not each.is_cuda], given[1:], given[:1]
        copy = self._copy(name, args, kwargs or {}, [*on_host, *made])
        if on_host and any(each.is_cuda for each in (*made, *given)):
            self.from_host.append(copy)
        if any(each.is_cuda for each in given) and any(not each.is_cuda for each in made):
            self.to_host.append(copy)
        return out

    def _copy(self, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Step:
        asynchronous = name in COPIES and (kwargs.get("non_blocking") or any(each is True for each in args))
        pinned = any(tensor is pinned_tensor for tensor in tensors for pinned_tensor in self._pinned)
        return Step(name, self.current_stream(), blocking=not (asynchronous and pinned))


EMPTY = torch.empty


def getitem(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """Indexing by operations: a build for the CPU has no device guard for it, nor for copies."""
    dimension = 0
    indices: list[Tensor | None] = []
    keys = key if isinstance(key, tuple) else (key,)
    for position, each in enumerate(keys):
        if each is Ellipsis:
            later = [index for index in keys[position + 1 :] if index is not None]
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
        copy = torch.ops.aten.copy_.default
        monkeypatch.setattr(
            FakeTensor, "copy_", lambda into, source, non_blocking=False: copy(into, source, non_blocking)
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    """Stand-ins for the functions of torch that ask CUDA."""
    torch.compiler.reset()  # what one test compiled must not serve another
    driver = CudaDriver()
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    for name, standing in {
        "is_available": lambda: driver.present,
        "synchronize": lambda device=None: driver.waits.append("torch.cuda.synchronize"),
        "current_stream": driver.current_stream,
        "stream": driver.on,
        "Stream": partial(Stream, driver),
        "Event": partial(Event, driver),
        "CUDAGraph": partial(Graph, driver),
        "graph_pool_handle": object,
    }.items():
        monkeypatch.setattr(torch.cuda, name, standing)
    monkeypatch.setattr(torch, "empty", driver.empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: driver.pin(tensor))
    monkeypatch.setattr(FakeTensor, "record_stream", lambda tensor, stream: None, raising=False)
    return driver


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


def rows_of(tiny: TinyModel, vocab_size: int) -> list[Row]:
    random = np.random.default_rng(0)
    rows = [tiny.row(length, vocab_size, random) for length in (1, 3, 33, 33, 60)]
    if tiny.prefixes:
        prefix = Prefix(rows[-1].token_ids)
        rows += [Row(row.token_ids, prefix=prefix) for row in rows[:3]]
    return rows


@dataclass(frozen=True)
class OnCuda:
    """A model on a fake card, with the engine's streams."""

    model: LoadedModel
    dtype: torch.dtype
    driver: CudaDriver
    streams: Any
    """The engine's streams, made of stand-ins."""
    rows: Sequence[Row]

    def launch(self, rows: Sequence[Row], lane: Lane, *, flash: bool = True) -> Launched:
        """Launch one batch as the engine does. Afterwards the driver's notes are those of this batch alone."""
        self.driver.forget()
        self.model.attention = self.attention(flash=flash)
        with self.driver:
            return launch(self.model, rows, Device(CUDA, self.streams), lane)

    def attention(self, *, flash: bool) -> Attention:
        """As the loader chooses it."""
        return attention_of(self.model.checkpoint, CUDA, self.dtype, flash=flash)

    def compile(self, graphs: int = 1) -> None:
        """The layers, traced as on a GPU; what inductor makes of the trace needs one."""
        before = compilations()
        packed = pack([*self.rows, *self.rows], CUDA, attention=self.attention(flash=True))

        def run(tokens: int) -> float:
            self.model.model.forward(packed)
            return 0.0

        compile_layers(self.model.model.layers, run, backend="eager")
        assert compilations() == before + graphs


@contextmanager
def on_cuda(
    folder: Path,
    tiny: TinyModel,
    dtype: torch.dtype,
    driver: CudaDriver,
    prepare: Callable[[Model], object] = lambda model: None,
) -> Iterator[OnCuda]:
    """`prepare` is given the model on the CPU."""
    checkpoint, model = load_model(folder, tiny.task, dtype)
    prepare(model)
    loaded = LoadedModel(cast(Any, None), checkpoint, model, cast(Any, None))
    with fake_cuda(model):
        yield OnCuda(loaded, dtype, driver, Streams.on(CUDA), rows_of(tiny, model.vocab_size))


def check_launched(on: OnCuda, launched: Launched, stream: Stream, width: int) -> None:
    """One copy there and one back, both asynchronous, each on its stream; all else on that of the pass."""
    driver, (part,) = on.driver, launched.parts
    assert driver.waits == []
    assert driver.devices == {CUDA}
    assert [(step.stream, step.blocking) for step in driver.from_host] == [(on.streams.copies, False)]
    assert [(step.stream, step.blocking) for step in driver.to_host] == [(stream, False)]
    assert {id(step.stream) for step in driver.steps if step.name in COMPUTING} <= {id(stream)}
    names = [step.name for step in driver.steps if step.stream is stream]
    assert names[0] == "wait", "the pass begins before its batch is there"
    assert stream.waited_for[-1].stream is not None
    assert names[-2:] == ["aten::copy_", "record"]
    assert cast(Any, part.done).stream is stream
    assert (part.answers.shape, part.answers.dtype) == ((len(part.indexes), width), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        pytest.param(torch.bfloat16, False, id="bf16-eager"),
        # The same again: what is around the layers does not depend on how they run, nor on their type.
        pytest.param(torch.bfloat16, True, id="bf16-compiled", marks=pytest.mark.nightly),
        pytest.param(torch.float32, False, id="fp32-eager", marks=pytest.mark.nightly),
        pytest.param(torch.float32, True, id="fp32-compiled", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize(
    "tiny", [pytest.param(*each.values, id=each.id, marks=at_night(each)) for each in every_family()]
)
def test_a_batch_is_launched_without_waiting(
    folder_of: Callable[[TinyModel], Path], driver: CudaDriver, tiny: TinyModel, dtype: torch.dtype, compiled: bool
) -> None:
    with on_cuda(folder_of(tiny), tiny, dtype, driver) as on:
        if compiled:
            on.compile(tiny.layer_kinds)
        prefixed = any(row.prefix is not None for row in on.rows)
        traced = compilations()
        for flash in (True, False):
            on.model.prefixes = PrefixMemory()
            for lane in (Lane.BULK, Lane.INTERACTIVE) if prefixed else (Lane.INTERACTIVE,):
                recalled = on.model.prefixes.recall(cast(Prefix, on.rows[-1].prefix)) if prefixed else None
                stream: Stream = on.streams.run[lane]
                launched = on.launch(on.rows, lane, flash=flash)
                check_launched(on, launched, stream, on.model.model.width)
                assert bool(launched.parts[0].packed.recalled) is (recalled is not None)
                assert recalled is None or cast(Any, recalled.computed) in stream.waited_for, (
                    "its keys may not be there yet"
                )
                calls = driver.count("torch_attn::_varlen_attn")
                layers = len(on.model.model.layers) * tiny.layer_runs
                assert calls == (layers if flash and tiny.flash and dtype is torch.bfloat16 else 0)
            assert bool(len(on.model.prefixes)) is prefixed
        assert compilations() == traced


@pytest.mark.parametrize(
    "tiny",
    [tiny_model(Task.EMBED, "bert"), tiny_model(Task.EMBED, "nvembed"), tiny_model(Task.RERANK, "qwen3")],
    ids=str,
)
def test_with_determinism_every_pass_is_launched_on_the_stream_of_its_lane(
    folder_of: Callable[[TinyModel], Path], driver: CudaDriver, tiny: TinyModel
) -> None:
    with on_cuda(folder_of(tiny), tiny, torch.bfloat16, driver) as on:
        on.model.alone = True
        for lane in Lane:
            parts = on.launch(on.rows, lane).parts
            assert sorted(index for part in parts for index in part.indexes) == list(range(len(on.rows)))
            assert driver.waits == []
            for copies, stream in ((driver.from_host, on.streams.copies), (driver.to_host, on.streams.run[lane])):
                assert [(step.stream, step.blocking) for step in copies] == [(stream, False)] * len(parts)
            computing = {id(step.stream) for step in driver.steps if step.name in COMPUTING}
            assert computing == {id(on.streams.run[lane])}
            assert not any(part.packed.new_prefixes or part.packed.recalled for part in parts)


@pytest.mark.parametrize(
    ("product", "compiled"),
    [
        (float8.scaled_by_row, False),
        (float8.scaled_afterwards, True),
        pytest.param(float8.scaled_by_row, True, marks=pytest.mark.nightly),
        pytest.param(float8.scaled_afterwards, False, marks=pytest.mark.nightly),
        pytest.param(float8.in_bfloat16, True, marks=pytest.mark.nightly),
    ],
)
def test_float8_is_launched_and_captured_without_waiting(
    folder_of: Callable[[TinyModel], Path],
    driver: CudaDriver,
    product: Product,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = tiny_model(Task.EMBED, "qwen3") if compiled else tiny_model(Task.RERANK, "bert")
    monkeypatch.setattr(float8, "product_on", lambda device: float8.in_bfloat16)  # not every torch's CPU has a kernel
    rows = [Row(np.array([1, 2, 3], dtype=np.int32))]

    def prepare(model: Model) -> None:
        to_float8(model, rows, torch.device("cpu"), Attention.SDPA)
        for layer in (each for module in model.modules for each in module.modules()):
            if isinstance(layer, Float8Linear):
                layer.product = product

    with on_cuda(folder_of(tiny), tiny, torch.bfloat16, driver, prepare) as on:
        if compiled:
            on.compile()
        check_launched(on, on.launch(on.rows, Lane.INTERACTIVE), on.streams.run[Lane.INTERACTIVE], on.model.model.width)
        layers = [each for module in on.model.model.modules for each in module.modules()]
        kernels = driver.count("vecmill::float8_product" if compiled else "aten::_scaled_mm_v2")
        assert kernels == (0 if product is float8.in_bfloat16 else sum(type(each) is Float8Linear for each in layers))
        with driver:
            capture = CudaCapture(on.model.model, CUDA, on.streams.run)
            driver.forget()
            capture(shape_of(64, 16))
        assert driver.to_host == []


@pytest.mark.parametrize(
    ("tiny", "compiled"),
    [
        *(
            pytest.param(
                *each.values,
                False,
                id=f"{each.id}-eager",
                marks=() if each.id in CAPTURED_EVERY_TIME else pytest.mark.nightly,
            )
            for each in every_family(flash=True)
        ),
        # Two are enough: what is around the layers does not depend on how they run.
        pytest.param(tiny_model(Task.EMBED, "qwen3"), True, id="embed-qwen3-compiled"),
        pytest.param(tiny_model(Task.RERANK, "bert"), True, id="rerank-bert-compiled"),
    ],
)
def test_a_captured_pass_reads_and_writes_on_the_device_alone(
    folder_of: Callable[[TinyModel], Path], driver: CudaDriver, tiny: TinyModel, compiled: bool
) -> None:
    with on_cuda(folder_of(tiny), tiny, torch.bfloat16, driver) as on:
        if compiled:
            on.compile(tiny.layer_kinds)
        model = on.model.model
        capture = CudaCapture(model, CUDA, on.streams.run)
        shapes = [shape_of(tokens, 64) for tokens in (64, 2048)]
        passes = {}
        for shape in shapes:
            driver.forget()
            with driver:
                passes[shape] = capture(shape)
            assert passes[shape].answers.shape == (shape.rows, model.width)
            names = [step.name for step in driver.steps]
            began, ended = names.index("capture"), names.index("captured")
            assert driver.steps[began].stream is on.streams.run[Lane.INTERACTIVE if shape.tokens <= 1024 else Lane.BULK]
            assert {id(step.stream) for step in driver.steps[began:ended]} == {id(driver.steps[began].stream)}
            assert names[began:ended].count("torch_attn::_varlen_attn") == len(model.layers) * tiny.layer_runs
            assert len(driver.from_host) == 1, "the batch that it is captured with"
            assert driver.to_host == []
        on.model.graphs = Graphs(passes)
        rows = [Row(row.token_ids, unpooled=row.unpooled, second_text=row.second_text) for row in on.rows]
        for batch, lane in ((rows[:3], Lane.INTERACTIVE), (rows * 3, Lane.BULK)):
            launched = on.launch(batch, Lane.BULK)
            check_launched(on, launched, on.streams.run[lane], model.width)
            assert driver.count("replay") == 1
            assert not {step.name for step in driver.steps} & COMPUTING


@pytest.mark.parametrize("flash", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["flash", "sdpa"])
def test_layers_with_a_sliding_window_never_wait(tmp_path: Path, driver: CudaDriver, flash: bool) -> None:
    """One layer with a window and one without, compiled; rows longer and shorter than it."""
    folder = shutil.copytree(GOLDEN / "qwen3" / "embedding", tmp_path / "model")
    edit_json(folder / "config.json", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with on_cuda(folder, tiny_model(Task.EMBED, "qwen3"), torch.bfloat16, driver) as on:
        on.compile(graphs=2)
        for lane in (Lane.BULK, Lane.INTERACTIVE):
            launched = on.launch(on.rows, lane, flash=flash)
            check_launched(on, launched, on.streams.run[lane], on.model.model.width)
            windows = [step.window for step in driver.steps if step.name == "torch_attn::_varlen_attn"]
            assert windows == ([[-1, 0], [7, 0]] if flash else [])


def test_what_would_make_the_host_wait_is_seen(driver: CudaDriver) -> None:
    """The driver of these tests notices every operation that makes the host wait."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        there = torch.zeros(4, device=CUDA)
        waiting: list[Callable[[], object]] = [
            lambda: there.cpu(),
            lambda: torch.zeros(4).to(CUDA),
            lambda: there.copy_(torch.zeros(4)),
            lambda: torch.ops.aten.index.Tensor(there, [torch.zeros(1, dtype=torch.int64)]),
        ]
        for operation in waiting:
            driver.forget()
            with driver:
                operation()
            assert [step.blocking for step in (*driver.from_host, *driver.to_host)] == [True]
        for needs_values in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            with pytest.raises(Exception, match=r"aten\."):
                needs_values.default(there)


def test_the_answers_are_waited_for_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """DEVICE=cuda:1: an event on the current device's stream (cuda:0) is done before the copy is."""
    from unittest.mock import MagicMock

    from vecmill.engine import forward

    devices: list[Any] = []
    recorded: list[Any] = []
    answers = MagicMock(is_cuda=True, shape=(2, 3), dtype=torch.float32, device=torch.device("cuda", 1))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: MagicMock())

    def current_stream(device: torch.device | None = None) -> str:
        devices.append(device)
        return "stream"

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    event = MagicMock(record=lambda stream=None: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    forward._to_host(answers)
    assert recorded == ["stream"]
    assert devices == [answers.device]


def test_attention_runs_on_the_oldest_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's `varlen_attn` has neither enable_gqa nor num_splits."""
    from vecmill.models import packed_attention

    def of_2_11(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return torch.zeros_like(query)

    batch = pack([Row(np.zeros(5, dtype=np.int32))] * 2, torch.device("cpu"))
    query, key = torch.zeros(1, 4, 16, 8), torch.zeros(1, 2, 16, 8)
    monkeypatch.setattr(
        packed_attention, "_varlen", lambda: partial(of_2_11, **packed_attention.varlen_options(of_2_11))
    )
    assert packed_attention._flash(query, key, key, batch, None, (-1, 0)).shape == (1, 16, 4, 8)
