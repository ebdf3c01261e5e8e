"""Linear layers whose bfloat16 weights lie in memory as the CPU's kernels read them.

torch's own layer has oneDNN bring its weights into that layout in each forward pass, which takes longer than the
product itself where tokens are few: a search's. Here it is done once, when the model is loaded; the product and its
bits are the same.

torch has no public name for it: the operations are those that its compiler uses for frozen weights. Where they are
missing, or compute something else than torch's layer on a trial, layers stay as they are.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.core.errors import first_line, is_out_of_memory
from vecmill.models.networks import Model, places_within

logger = logging.getLogger(__name__)

# For which the layout is chosen. Of 64 to 1,280 tokens each gives the same speed at any number.
TOKENS = 256
# Rounding to bfloat16 moves a product by 0.4 % of its length at most; a kernel that computes something else is far off.
MOST_OFF = 0.01


class PrepackedLinear(nn.Module):
    """(..., in) -> (..., out) bfloat16, as the nn.Linear that it stands for."""

    def __init__(self, linear: nn.Linear) -> None:
        """Its weights are copied."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), TOKENS)
        self.weight = nn.Parameter(packed, requires_grad=False)  # opaque: it has a type and a shape, but no address
        self.bias: Tensor | None = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        return out


@torch.no_grad()
def prepack(model: Model) -> int:
    """Exchange the linear layers of a model that is on a CPU and in bfloat16; returns how many.

    Layer by layer, so that the weights are never in memory twice, and each at once wherever it is: should memory end on
    the way, the model runs as it is then, and whoever shares its network or loads it again has a whole one.
    """
    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent, name, child in places_within(model.modules):
        if type(child) is nn.Linear and _can_be(child):
            places.setdefault(child, []).append((parent, name))
    count = len(places)
    while places:
        linear, where = places.popitem()
        exchanged = PrepackedLinear(linear).eval()
        for parent, name in where:
            setattr(parent, name, exchanged)
    return count


def prepacked(linear: nn.Linear) -> nn.Module:
    """The layer as `prepack` leaves it in a model: itself where it is not exchanged."""
    return PrepackedLinear(linear).eval() if _can_be(linear) else linear


def _can_be(linear: nn.Linear) -> bool:
    return linear.weight.dtype is torch.bfloat16 and linear.weight.device.type == "cpu" and _is_right()


@lru_cache
def _is_right() -> bool:
    """Whether this machine and this torch have the operations, found out by trying."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 24, 64), (48, 64), (48,))
    )
    linear = nn.Linear(64, 48, device="meta")
    linear.weight, linear.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    wanted = F.linear(hidden.float(), weight.float(), bias.float())
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        off = PrepackedLinear(linear)(hidden).float() - wanted
        if off.norm() <= MOST_OFF * wanted.norm():
            return True
        reason = "they give other numbers"
    except Exception as error:  # an operation that is not there is missed in many ways
        if is_out_of_memory(error):  # says nothing of the operations: the next load tries again
            raise
        reason = first_line(error)[:160]
    logger.info("linear layers stay as torch has them: the prepacked ones cannot be used here: %s", reason)
    return False
