"""A full-size model of random weights, made on the device, and the work that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from benchmarks.gpu_sizes import GpuSizes
from benchmarks.model_builds import build, matmul_parameters
from benchmarks.model_forward import operations, run_model
from benchmarks.model_rounds import Side
from benchmarks.model_shapes import Shape
from benchmarks.model_workloads import first_tokens, ragged_rows
from torch import Tensor, nn

from vecmill.core.types import Row, TokenIds
from vecmill.models.packing import pack
from vecmill.models.registry import Model
from vecmill.models.weights import Target

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
    return Subject(name, kind, shape, target, build(kind, shape, target, folder), folder, texts)


def forward(subject: Subject, rows: Sequence[Row]) -> Side:
    """Forward passes over a pack that is on the device: in the server another thread packs while one runs."""
    packed = pack(rows, subject.target.device)

    def run() -> Tensor:
        return subject.model.forward(packed, use_flash_attn=True).cpu()

    return Side(run, subject.operations([rows]), subject.weight_bytes)


def forwards(subject: Subject, sizes: GpuSizes) -> dict[str, Side]:
    """A forward pass of each size, by its tokens; a query with its packing; and a large read."""
    rows = {tokens: first_tokens(subject.texts, tokens) for tokens in sizes.tokens}
    sides = {str(tokens): forward(subject, rows[tokens]) for tokens in sizes.tokens}
    query = rows[sizes.tokens[0]]
    anew = partial(run_model, subject.model, [query], subject.target.device)
    return {
        **sides,
        WITH_PACKING: Side(anew, subject.operations([query]), subject.weight_bytes),
        READ: read_side(sizes.copy_bytes, subject.target.device),
    }


def read_side(size: int, device: torch.device) -> Side:
    """A sum over so many bytes: as weights they are read and hardly anything is written."""
    values = torch.ones(size // torch.float32.itemsize, device=device)
    return Side(lambda: values.sum(), 0, size)


def matrix_products(subject: Subject, tokens: int) -> Side:
    """All of the model's matrix products of so many tokens, and nothing else: what a forward pass cannot be beyond."""
    linears = list(_linears(subject.model.modules))
    inputs = {linear.in_features: _random(tokens, linear.in_features, subject.target) for linear in linears}

    def run() -> Tensor:
        result = next(iter(inputs.values()))
        for linear in linears:
            result = linear(inputs[linear.in_features])
        return result

    products = 2.0 * tokens * sum(linear.weight.numel() for linear in linears)
    return Side(run, products, subject.weight_bytes)


def _linears(modules: Sequence[nn.Module]) -> Iterator[nn.Linear]:
    return (each for module in modules for each in module.modules() if isinstance(each, nn.Linear))


def _random(tokens: int, width: int, target: Target) -> Tensor:
    # Random: a GPU draws less power, and so runs faster, on constants.
    return torch.randn(tokens, width, device=target.device).to(target.dtype)


def one_forward(subject: Subject, tokens: int) -> float:
    """Seconds of one forward pass of so many tokens in ragged rows; the compiler's choice asks for it."""
    packed = pack(first_tokens(subject.texts, tokens), subject.target.device)
    started = perf_counter()
    subject.model.forward(packed, use_flash_attn=True).cpu()
    return perf_counter() - started


def estimate(sides: Mapping[str, Side], rounds: int, seconds: float, matmul_rate: float) -> float:
    """Seconds that timing the sides takes at about a third of the matmul rate."""
    once = sum(max(seconds, 3 * side.operations / matmul_rate) for side in sides.values())
    return (rounds + 2) * once  # each is run twice before the rounds
