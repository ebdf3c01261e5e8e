"""Linear layers in float8: weights stored in one byte, activations rounded to it in each forward pass.

Numbers are float8_e4m3fn: three bits of mantissa, up to 448. Each output channel of a weight and each token of the
activations has a scale of its own, so that one large value costs only its own row precision. A token with a value that
is not finite stays that token's error. What is not a linear layer of the repeated blocks stays in bfloat16: norms,
embeddings, attention itself, heads.

A model is rounded once it has answered `samples` in bfloat16; `Comparison` says how much its answers moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from vecmill.core.errors import first_line
from vecmill.core.types import Row
from vecmill.models.networks import Model, move_tensors, replace_modules
from vecmill.models.packing import Attention, PackedBatch, pack
from vecmill.models.weight_files import ALIGNED

logger = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
# Of a scale: what is so small is zero in bfloat16, too, and its reciprocal is still finite.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Rounding to float8 moves a product by 4 % of its length at most; a kernel that computes something else is far off.
MOST_OFF = 0.02

Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(T, in) and (out, in) in float8, their scales (T, 1) and (1, out), a bias (out,) or none -> (T, out) bfloat16."""


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, width) of any floating-point type -> the same in float8, and (n, 1) float32 that it is to be multiplied by.

    A row of zeros stays zeros. A row with a value that is not finite has NaN in it.
    """
    values = values.float()
    scales = (values.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    # Clamped, as a quotient may round to just above the largest number, which would be NaN.
    return (values / scales).clamp(-LARGEST, LARGEST).to(FLOAT8), scales


def scaled_by_row(
    values: Tensor, weight: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """One kernel that scales by token and by channel itself."""
    kernel = _kernel if torch.compiler.is_compiling() else _multiply
    return kernel(values, weight, value_scales, weight_scales, bias, True)


def scaled_afterwards(
    values: Tensor, weight: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """A kernel that takes one scale for a whole tensor, here 1, and the scales of rows afterwards.

    For compute capability 12.x, whose kernels have no other. Sums are at most 448 * 448 * in: far within bfloat16.
    """
    one = torch.ones((), device=values.device)
    kernel = _kernel if torch.compiler.is_compiling() else _multiply
    return _scaled(kernel(values, weight, one, one, None, False), value_scales, weight_scales, bias)


def _multiply(
    values: Tensor, weight: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, by_row: bool
) -> Tensor:
    recipe = ScalingType.RowWise if by_row else ScalingType.TensorWise
    return F.scaled_mm(
        values,
        weight.t(),
        value_scales,
        recipe,
        weight_scales,
        recipe,
        bias=bias,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


# For torch.compile, which in torch 2.11 cannot look into F.scaled_mm.
@torch.library.custom_op("vecmill::float8_product", mutates_args=())
def _kernel(
    values: Tensor, weight: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, by_row: bool
) -> Tensor:
    return _multiply(values, weight, value_scales, weight_scales, bias, by_row)


@_kernel.register_fake
def _(
    values: Tensor, weight: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, by_row: bool
) -> Tensor:
    return values.new_empty(values.shape[0], weight.shape[0], dtype=torch.bfloat16)


def in_bfloat16(
    values: Tensor, weight: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """The same numbers multiplied in bfloat16, which holds each of them exactly: less memory, no more speed."""
    return _scaled(F.linear(values.bfloat16(), weight.bfloat16()), value_scales, weight_scales, bias)


def _scaled(product: Tensor, value_scales: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    scaled = product.float() * weight_scales * value_scales  # a token's may be the larger by far
    return (scaled if bias is None else scaled + bias).bfloat16()


PRODUCTS: Mapping[Product, str] = {
    scaled_by_row: "",
    scaled_afterwards: "",
    in_bfloat16: "; this card's kernels for float8 cannot be used: products run in bfloat16, no faster",
}
"""The first that works is used. What the model's card says of it."""


@lru_cache
def product_on(device: torch.device) -> Product:
    """What multiplies in float8 on a device, found out by trying."""
    for product in PRODUCTS:
        try:
            if _is_right(product, device):
                return product
            reason = "it gives other numbers"
        except Exception as error:  # a kernel that is not there is missed in many ways
            reason = first_line(error)[:160]
        logger.debug("float8: %s cannot be used on %s: %s", product.__name__, device, reason)
    return in_bfloat16


def _is_right(product: Product, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randn(rows, 64, generator=generator) * 10.0 for rows in (48, 32))
    bias = torch.randn(32, generator=generator).bfloat16()
    (small, scales), (small_weight, weight_scales) = rounded(values), rounded(weight)
    wanted = (small.float() * scales) @ (small_weight.float() * weight_scales).t() + bias.float()
    given = (each.to(device) for each in (small, small_weight, scales, weight_scales.t().contiguous(), bias))
    off = product(*given).float().cpu() - wanted
    return bool(off.norm() <= MOST_OFF * wanted.norm())


class Float8Linear(nn.Module):
    """(..., in) -> (..., out) bfloat16, as the nn.Linear that it stands for."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None, product: Product) -> None:
        """`weight`: (out, in) in float8; `scales`: (1, out) float32."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scales = (nn.Parameter(each, requires_grad=False) for each in (weight, scales))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.product = product

    def forward(self, hidden: Tensor) -> Tensor:
        values, scales = rounded(hidden.reshape(-1, self.in_features))
        out = self.product(values, self.weight, scales, self.scales, self.bias)
        return out.view(*hidden.shape[:-1], self.out_features)


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> the same in float8, and (1, out) float32, a scale for each output."""
    small, scales = rounded(weight)
    return small, scales.t().contiguous()


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's answers in float8 are from those in bfloat16."""

    texts: int
    least_cosine: float
    """Of a text's vector, or of what a reranker's head is given of a pair."""
    relevance: float | None
    """By how much a reranker's relevance moved at most; None for an embedder."""

    @property
    def sentence(self) -> str:
        """For people: part of why the model has its type."""
        moved = "" if self.relevance is None else f", relevance moved by {self.relevance:.3f} at most"
        return f"the cosine to bfloat16 is {self.least_cosine:.4f} or more on {self.texts} texts{moved}"


def linears(layers: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear layers of a model's blocks that can be in float8, each once."""
    found = dict.fromkeys(module for layer in layers for module in layer.modules() if type(module) is nn.Linear)
    return [each for each in found if each.weight.dtype is torch.bfloat16 and _is_aligned(each)]


def _is_aligned(linear: nn.Linear) -> bool:
    return linear.in_features % ALIGNED == 0 and linear.out_features % ALIGNED == 0


def in_float8(layers: Iterable[nn.Module]) -> bool:
    """Whether blocks have layers in float8 already: those of a model that shares its network with another."""
    return any(isinstance(module, Float8Linear) for layer in layers for module in layer.modules())


@torch.no_grad()
def to_float8(model: Model, samples: Sequence[Row], device: torch.device, attention: Attention) -> Comparison:
    """Round the linear layers of a model that is in bfloat16, and compare its answers before and after.

    Its weights may be on the CPU still: then each goes to the device as it is needed and stays there in float8 alone,
    so that the model never takes more of the device than it will.
    """
    rounding = linears(model.layers)
    move_tensors(model, device, but={id(each) for linear in rounding for each in linear.parameters()})
    product = product_on(device)
    packed = pack(samples, device, attention=attention)
    made: dict[nn.Module, Float8Linear] = {}
    with ExitStack() as hooks:
        for linear in rounding:
            if linear.weight.device != device:
                hooks.enter_context(_Staged(linear, device, product, made))
        exact = _answers(model, packed)
    for linear in rounding:
        if linear not in made:
            made[linear] = _rounded(linear, device, product)
        linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # its memory is needed for the next
    replace_modules(model.modules, made)
    return _compared(exact, _answers(model, packed))


class _Staged:
    """While it is entered, a linear layer on the CPU runs on the device, with a copy of its weights for each call."""

    def __init__(
        self, linear: nn.Linear, device: torch.device, product: Product, made: dict[nn.Module, Float8Linear]
    ) -> None:
        self._linear, self._device, self._product, self._made = linear, device, product, made
        self._on_host: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [
            self._linear.register_forward_pre_hook(self._before),
            self._linear.register_forward_hook(self._after),
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, linear: nn.Module, given: Any) -> None:
        with torch.inference_mode(False):
            for name, parameter in linear.named_parameters():
                self._on_host[name] = parameter.data
                parameter.data = parameter.data.to(self._device)

    def _after(self, linear: nn.Module, given: Any, out: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self._linear not in self._made:  # some blocks run several times in a pass
                self._made[self._linear] = _rounded(self._linear, self._device, self._product)
            for name, parameter in linear.named_parameters():
                parameter.data = self._on_host.pop(name)


def _rounded(linear: nn.Linear, device: torch.device, product: Product) -> Float8Linear:
    weight, scales = round_weight(linear.weight.to(device))
    bias: Tensor | None = linear.bias  # torch's type leaves out that there may be none
    return Float8Linear(weight, scales, None if bias is None else bias.to(device), product).eval()


@torch.inference_mode()
def _answers(model: Model, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """What is compared by cosine, (N, width), and the model's answers."""
    pooled = model.pooled(packed)
    answers = model.finish(pooled)
    return (pooled if model.width == 1 else answers).float().cpu(), answers.float().cpu()


def _compared(exact: tuple[Tensor, Tensor], small: tuple[Tensor, Tensor]) -> Comparison:
    # What is not finite must not look like a good answer.
    cosines = F.cosine_similarity(exact[0], small[0], dim=1).nan_to_num(nan=-1.0)
    scores = exact[1].shape[1] == 1
    moved = (exact[1].sigmoid() - small[1].sigmoid()).abs().nan_to_num(nan=1.0)
    return Comparison(len(cosines), float(cosines.min()), float(moved.max()) if scores else None)
