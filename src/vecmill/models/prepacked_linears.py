"""Linear layers whose bfloat16 weights lie in memory as the CPU's kernels read them.

torch's own layer has oneDNN bring its weights into that layout in each forward pass, which takes longer than the
product itself where tokens are few: a search's. Here it is done once, when the model is loaded; the product and its
bits are the same.

In BERT's layers the activation after a product, and the sum of a product and the block's input, are computed in the
same operation. By themselves they would read and write all values once more, and the product would be rounded to
bfloat16 in between.

torch has no public name for it: the operations are those that its compiler uses for frozen weights. Where they are
missing, or compute something else than torch's layer on a trial, layers stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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
        return self.then("none", hidden)

    def then(self, activation: str, hidden: Tensor) -> Tensor:
        """The product, and the activation of it: one of `FUSED`, or "none"."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, activation, [], "none")
        return out

    def plus(self, hidden: Tensor, other: Tensor) -> Tensor:
        """The sum of the product and `other`, which has the product's shape."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(hidden, other, self.weight, self.bias, "add")
        return out


# Activations that are computed with the product: what the operation calls each, and torch's own.
FUSED: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class FusedIntermediate(nn.Module):
    """The first half of BERT's feed-forward layer, as transformers' `BertIntermediate`."""

    def __init__(self, dense: PrepackedLinear, activation: str) -> None:
        super().__init__()
        self.dense, self.activation = dense, activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, width) -> (1, T, inner width)"""
        return self.dense.then(self.activation, hidden_states)


class FusedOutput(nn.Module):
    """The end of BERT's attention and feed-forward layers, as transformers' `BertSelfOutput` and `BertOutput`."""

    def __init__(self, dense: PrepackedLinear, norm: nn.Module) -> None:
        super().__init__()
        self.dense, self.LayerNorm = dense, norm

    def forward(self, hidden_states: Tensor, before: Tensor) -> Tensor:
        """(1, T, inputs) and (1, T, width) -> (1, T, width)"""
        normed: Tensor = self.LayerNorm(self.dense.plus(hidden_states, before))
        return normed


def _fused(module: nn.Module) -> nn.Module | None:
    """The fused module in place of one of BERT's layers with a prepacked linear layer; None for any other module.

    The modules are recognized by the names of their children, which all classes that transformers derives from BERT's
    share.
    """
    parts = dict(module.named_children())
    dropout = parts.pop("dropout", None)
    dense = parts.get("dense")
    if not isinstance(dense, PrepackedLinear) or isinstance(module, FusedIntermediate | FusedOutput):
        return None
    if parts.keys() == {"dense", "intermediate_act_fn"} and dropout is None:
        activation = _activation(parts["intermediate_act_fn"])
        return FusedIntermediate(dense, activation) if activation and _is_right(activation) else None
    if parts.keys() == {"dense", "LayerNorm"} and _is_right("add"):
        return FusedOutput(dense, parts["LayerNorm"])
    return None


def _activation(module: nn.Module) -> str | None:
    """What FUSED calls it, if it is among them. transformers has classes of its own, which hold torch's functions."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else None
    if isinstance(module, nn.ReLU):
        return "relu"
    return next((name for name, function in FUSED.items() if getattr(module, "act", None) is function), None)


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
    for parent, name, child in places_within(model.modules):
        if (fused := _fused(child)) is not None:
            setattr(parent, name, fused.eval())
    return count


def prepacked(linear: nn.Linear) -> nn.Module:
    """The layer as `prepack` leaves it in a model: itself where it is not exchanged."""
    return PrepackedLinear(linear).eval() if _can_be(linear) else linear


def _can_be(linear: nn.Linear) -> bool:
    return linear.weight.dtype is torch.bfloat16 and linear.weight.device.type == "cpu" and _is_right()


@lru_cache
def _is_right(following: str = "none") -> bool:
    """Whether this machine and this torch have the operation with what follows the product, found out by trying.

    Args:
        following: one of FUSED, "add" or "none".
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, other = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 24, 64), (48, 64), (48,), (2, 24, 48))
    )
    linear = nn.Linear(64, 48, device="meta")
    linear.weight, linear.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    product = F.linear(hidden.float(), weight.float(), bias.float())
    wanted = product + other if following == "add" else FUSED.get(following, torch.positive)(product)
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        packed = PrepackedLinear(linear)
        out = packed.plus(hidden, other) if following == "add" else packed.then(following, hidden)
        if (out.float() - wanted).norm() <= MOST_OFF * wanted.norm():
            return True
        reason = "it gives other numbers"
    except Exception as error:  # an operation that is not there is missed in many ways
        if is_out_of_memory(error):  # says nothing of the operations: the next load tries again
            raise
        reason = first_line(error)[:160]
    what = (
        "the product of linear layers stays" if following == "none" else f"what follows the product ({following}) stays"
    )
    logger.info("%s as torch has it: oneDNN's operation cannot be used here: %s", what, reason)
    return False
