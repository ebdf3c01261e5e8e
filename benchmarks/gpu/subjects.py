"""A full-size model of random weights, made on the device, and the work that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmarks.lib.timing import TimedSide
from benchmarks.models.builds import build, matmul_parameters
from benchmarks.models.shapes import BERT_BASE, CUDA, NV_EMBED_V2, QUICK, QWEN3_0_6B, QWEN3_4B, Shape
from benchmarks.models.workloads import first_tokens, operations, ragged_rows
from torch import Tensor, nn

from vecmill.core.types import Lane, Row, TokenIds
from vecmill.engine.compilation import compile_layers, make_eager
from vecmill.engine.cuda_graphs import CudaCapture, Graphs, capture_graphs
from vecmill.models.networks import Model
from vecmill.models.packed_attention import attention_on
from vecmill.models.packing import Attention, PackedBatch, PackShape, pack
from vecmill.models.weights import Target

MAX_ROWS = 1024
"""Of a captured pass; the server's default for MAX_BATCH_SIZE on a GPU."""
READ = "read"
WITH_PACKING = "one query, packed anew"


@dataclass(frozen=True)
class Subject:
    """A model that is measured."""

    name: str
    kind: str
    shape: Shape
    target: Target
    model: Model
    folder: Path
    """Where NV-Embed's latent attention is, as on the hub."""
    texts: Sequence[TokenIds]
    """Random tokens in the lengths of code chunks."""
    graphs: Graphs = field(default_factory=Graphs)
    """Empty until `capture` is called."""
    stream: torch.cuda.Stream | None = None
    """On which graphs are captured and run; None on a CPU."""

    @property
    def capturing(self) -> CudaCapture:
        """What captures the model's passes, all on one stream."""
        assert self.stream is not None
        return CudaCapture(self.model, self.target.device, dict.fromkeys(Lane, self.stream))

    def capture(self, largest: int) -> None:
        """Capture passes of up to so many tokens, as far as that is faster, as the server does at warm-up."""

        def run_directly(packed: PackedBatch) -> None:
            self.model.forward(packed)

        captured = capture_graphs(self.capturing, run_directly, self.target.device, largest, MAX_ROWS)
        self.graphs.passes, self.graphs.gains = captured.passes, captured.gains
        self.graphs.memory_bytes, self.graphs.reason = captured.memory_bytes, captured.reason

    @property
    def attention(self) -> Attention:
        """The attention that its batches are packed for."""
        return attention_on(self.target.device, self.target.dtype)

    def pack(self, rows: Sequence[Row]) -> PackedBatch:
        """On the device, in the shape of a graph where one holds them."""
        shape = self.graphs.shape_for(rows)
        with self._on_stream(shape):  # the pass does not wait for copies on another one
            return pack(rows, self.target.device, shape=shape, attention=self.attention)

    def run(self, packed: PackedBatch) -> Tensor:
        """(N, width) on the CPU in packed order."""
        if packed.shape is None:
            return self.model.forward(packed).cpu()
        with self._on_stream(packed.shape):
            return self.graphs.run(packed).cpu()

    def _on_stream(self, shape: PackShape | None) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream is not None and shape is not None else nullcontext()

    def run_all(self, packs: Sequence[Sequence[Row]]) -> Tensor:
        """(N, width) on the CPU in the rows' order."""
        parts = []
        for rows in packs:
            packed = self.pack(rows)
            answers = self.run(packed)
            restored = torch.empty_like(answers)
            restored[torch.tensor(packed.order)] = answers
            parts.append(restored)
        return torch.cat(parts)

    @property
    def text_shape(self) -> Shape:
        """The decoder's config.json."""
        decoder: Shape = self.shape.get("text_config", self.shape)
        return decoder

    @property
    def weight_bytes(self) -> int:
        """Of the matrices that every forward pass reads: all but the token embedding."""
        return matmul_parameters(self.model.modules) * self.target.dtype.itemsize

    def operations(self, packs: Sequence[Sequence[Row]]) -> float:
        """Floating-point operations of the packs' forward passes, filler and padding not counted."""
        return operations(self.kind, self.model, self.text_shape, packs)


def make(name: str, kind: str, shape: Shape, sizes: GpuSizes, target: Target, folder: Path) -> Subject:
    """Draw the weights on the target's device; only NV-Embed's latents, which are folded, are written to `folder`."""
    vocab_size = shape.get("text_config", shape)["vocab_size"]
    texts = ragged_rows(sizes.texts[1], vocab_size, sizes.longest_text)
    stream = torch.cuda.Stream(target.device) if target.device.type == "cuda" else None  # type: ignore[no-untyped-call]
    return Subject(name, kind, shape, target, build(kind, shape, target, folder), folder, texts, stream=stream)


def forward(subject: Subject, rows: Sequence[Row]) -> TimedSide:
    """Forward passes over a pack that is on the device: in the server another thread packs while one runs."""
    packed = subject.pack(rows)
    return TimedSide(partial(subject.run, packed), subject.operations([rows]), subject.weight_bytes)


def forwards(subject: Subject, sizes: GpuSizes) -> dict[str, TimedSide]:
    """A forward pass of each size, by its tokens; a query with its packing; and a large read."""
    rows = {tokens: first_tokens(subject.texts, tokens) for tokens in sizes.tokens}
    sides = {str(tokens): forward(subject, rows[tokens]) for tokens in sizes.tokens}
    query = rows[sizes.tokens[0]]
    anew = partial(subject.run_all, [query])
    return {
        **sides,
        WITH_PACKING: TimedSide(anew, subject.operations([query]), subject.weight_bytes),
        READ: read_side(sizes.copy_bytes, subject.target.device),
    }


def read_side(size: int, device: torch.device) -> TimedSide:
    """A sum over so many bytes: as weights they are read and hardly anything is written."""
    values = torch.ones(size // torch.float32.itemsize, device=device)
    return TimedSide(lambda: values.sum(), 0, size)


def matrix_products(subject: Subject, tokens: int) -> TimedSide:
    """The model's matrix products for so many tokens and nothing else: no forward pass can be faster."""
    linears = list(_linears(subject.model.modules))
    inputs = {linear.in_features: _random(tokens, linear.in_features, subject.target) for linear in linears}

    def run() -> Tensor:
        result = next(iter(inputs.values()))
        for linear in linears:
            result = linear(inputs[linear.in_features])
        return result

    products = 2.0 * tokens * sum(linear.weight.numel() for linear in linears)
    return TimedSide(run, products, subject.weight_bytes)


def _linears(modules: Sequence[nn.Module]) -> Iterator[nn.Linear]:
    return (each for module in modules for each in module.modules() if isinstance(each, nn.Linear))


def _random(tokens: int, width: int, target: Target) -> Tensor:
    # Random: a GPU draws less power, and so runs faster, on constants.
    return torch.randn(tokens, width, device=target.device).to(target.dtype)


def one_forward(subject: Subject, tokens: int) -> float:
    """Seconds of one forward pass of so many tokens in ragged rows; the compiler's choice asks for it."""
    packed = pack(first_tokens(subject.texts, tokens), subject.target.device, attention=subject.attention)
    started = perf_counter()
    subject.model.forward(packed).cpu()
    return perf_counter() - started


def compile_if_possible(subject: Subject, backend: str) -> bool:
    """Compile its layers; False: they run as they are written."""
    try:
        compile_layers(subject.model.layers, partial(one_forward, subject), backend)
    except Exception as error:  # compilers fail in every way there is
        make_eager(subject.model.layers)
        print(f"{subject.name}: not compiled ({type(error).__name__}: {str(error)[:200]})", flush=True)
        return False
    return True


def estimate(sides: Mapping[str, TimedSide], rounds: int, seconds: float, matmul_rate: float) -> float:
    """Seconds that timing the sides takes at about a third of the matmul rate."""
    once = sum(max(seconds, 3 * side.operations / matmul_rate) for side in sides.values())
    return (rounds + 2) * once  # each is run twice before the rounds


@dataclass(frozen=True)
class GpuSizes:
    """What one run measures."""

    models: Mapping[str, tuple[str, Shape]]
    """Name to kind and shape, in this order."""
    first: str
    """The model with a target for its share of the matmul rate."""
    tokens: Sequence[int]
    """Of one forward pass, ascending; the first is a single search query."""
    matrix_tokens: Sequence[int]
    """At which the model's matrix products are also timed alone."""
    busy_tokens: int
    """From here on the share of the matmul rate has a target."""
    longest_text: int
    texts: tuple[int, int]
    """Fewest and most that are embedded against sentence-transformers."""
    encode_seconds: float
    """How long vecmill should take for the texts; decides how many there are."""
    compared_rows: int
    """Whose bits are compared, each alone and in batches."""
    compositions: int
    """Random ones of the batches that rows are compared in."""
    searched: tuple[int, int]
    """Queries, and documents that are ranked for each."""
    rounds: int
    seconds: float
    """Of each side in each round, at least one call."""
    matmul_size: int
    copy_bytes: int
    compile_backend: str


FULL = GpuSizes(
    models={
        "Qwen3-Embedding-0.6B": ("qwen3", QWEN3_0_6B),
        "Qwen3-Embedding-4B": ("qwen3", QWEN3_4B),
        "BERT-base": ("bert", {**BERT_BASE, "max_position_embeddings": 8192}),
        "NV-Embed-v2": ("nvembed", NV_EMBED_V2),
    },
    first="Qwen3-Embedding-4B",
    tokens=(16, 64, 256, 1024, 4096, 8192, 16384),
    matrix_tokens=(16, 4096),
    busy_tokens=4096,
    longest_text=8192,
    texts=(256, 2048),
    encode_seconds=0.5,
    compared_rows=32,
    compositions=2,
    searched=(64, 256),
    rounds=5,
    seconds=0.2,
    matmul_size=CUDA.matmul_size,
    copy_bytes=CUDA.copy_bytes,
    compile_backend="inductor",
)
TINY = GpuSizes(
    models=QUICK.whole,
    first=next(iter(QUICK.whole)),
    tokens=(16, 64, 256),
    matrix_tokens=(16, 64),
    busy_tokens=64,
    longest_text=512,
    texts=(48, 48),
    encode_seconds=0.0,
    compared_rows=8,
    compositions=2,
    searched=(8, 32),
    rounds=2,
    seconds=0.0,
    matmul_size=QUICK.matmul_size,
    copy_bytes=QUICK.copy_bytes,
    compile_backend="eager",  # traced by dynamo as on a GPU, without a compiler
)
