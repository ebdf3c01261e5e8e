"""Linear layers whose bfloat16 weights lie in memory as the CPU's kernels read them.

torch's own layer has oneDNN bring its weights into that layout in each forward pass, which takes longer than the
product itself where tokens are few: a search's. Here it is done once, when the model is loaded; the product and its
bits are the same.

What follows a product is computed with it: an activation in the same operation, where the product is not rounded to
bfloat16 in between; the sum with the block's input in the same, or in that of its norm (`fused_norms`). By itself each
would read and write all values once more.

torch has no public name for it: the operations are those that its compiler uses for frozen weights. Where they are
missing, or compute something else than torch's layer on a trial, layers stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.core.errors import first_line, is_out_of_memory
from vecmill.models.cpu_kernels import STEP, CpuKernels, cpu_kernels, torch_threads
from vecmill.models.fused_norms import FusedGemmaRMSNorm, FusedLayerNorm, FusedRMSNorm
from vecmill.models.merged_projections import MergedAttention
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
        name, variant = FUSED[activation][:2] if activation in FUSED else (activation, "none")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, name, [], variant)
        return out

    def plus(self, hidden: Tensor, other: Tensor) -> Tensor:
        """The sum of the product and `other`, which has the product's shape."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(hidden, other, self.weight, self.bias, ADD)
        return out


ADD = "add"
# Activations that are computed with the product: what the operation calls each, of which variant, and torch's own.
FUSED: Mapping[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", "none", F.gelu),
    "gelu_tanh": ("gelu", "tanh", partial(F.gelu, approximate="tanh")),
    "relu": ("relu", "none", F.relu),
    "silu": ("swish", "none", F.silu),
}


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
        if isinstance(self.LayerNorm, FusedLayerNorm) and self.LayerNorm.adds_faster:
            return self.LayerNorm.forward(self.dense(hidden_states), before)
        normed: Tensor = self.LayerNorm(self.dense.plus(hidden_states, before))
        return normed


class FusedGatedMLP(nn.Module):
    """A gated feed-forward layer: the activation of one product times another, then a third."""

    def __init__(self, gate: PrepackedLinear, up: PrepackedLinear, down: nn.Module, activation: str) -> None:
        """`activation`: of the gate."""
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        gate = self.gate.then(self.activation, hidden_states)
        # By itself: oneDNN multiplies with another tensor more slowly than it takes to read and write both once more.
        inner: Tensor = self.up(hidden_states)
        down: Tensor = self.down(inner.mul_(gate))
        return down


def _layer_norm(norm: nn.LayerNorm, kernels: CpuKernels) -> FusedLayerNorm | None:
    weight: Tensor | None = norm.weight  # none where it was made without
    if weight is None or weight.dtype is not torch.bfloat16 or weight.dim() != 1 or len(weight) % STEP:
        return None
    return FusedLayerNorm(norm, kernels)


def _fused_norm(module: nn.Module, kernels: CpuKernels | None) -> FusedRMSNorm | FusedGemmaRMSNorm | None:
    """The norm in place of an RMS norm of transformers, whose classes differ in names; None if that computes another.

    torch alone would take as long for Gemma's as it takes now.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype is not torch.bfloat16:
        return None
    sample = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).bfloat16()
    fused: FusedRMSNorm | FusedGemmaRMSNorm
    if isinstance(epsilon := getattr(module, "variance_epsilon", None), float):
        fused = FusedRMSNorm(weight, epsilon, kernels)
        with torch_threads(1):  # as most passes have it: with the kernel
            computed = fused(sample)
    elif isinstance(epsilon := getattr(module, "eps", None), float) and kernels is not None and not len(weight) % STEP:
        fused = FusedGemmaRMSNorm(module, weight, epsilon, kernels)
        computed = kernels.rms_norm(sample, weight, epsilon, offset=1.0, rounds=False)
    else:
        return None
    return fused if torch.allclose(computed, module(sample), rtol=MOST_OFF, atol=0) else None


def _fused(module: nn.Module, kernels: CpuKernels | None = None) -> nn.Module | None:
    """The fused module in place of one whose linear layers are prepacked, or of a norm; None for any other module.

    Modules are recognized by the names of their children, which all classes that transformers derives from BERT's
    share, and norms by the end of their class's name.
    """
    if type(module).__name__.endswith("RMSNorm"):
        return _fused_norm(module, kernels)
    if type(module) is nn.LayerNorm:
        return _layer_norm(module, kernels) if kernels is not None else None
    if hasattr(module, "rotates_with"):
        setattr(module, "rotates_with", kernels)  # noqa: B010  # torch's type of it would be that of a parameter
        return None
    return _fused_linears(module, kernels)


def _fused_linears(module: nn.Module, kernels: CpuKernels | None) -> nn.Module | None:
    """The fused module in place of one whose linear layers are prepacked."""
    idle = nn.Dropout | nn.Identity
    parts = {name: child for name, child in module.named_children() if not isinstance(child, idle)}
    linears = [child for child in parts.values() if isinstance(child, PrepackedLinear)]
    if parts.keys() == {"Wqkv", "Wo"} and len(linears) == 2:  # ModernBERT's
        return _modernbert_attention(module, kernels)
    if parts.keys() == {"lin1", "lin2", "activation"} and len(linears) == 2:  # DistilBERT's
        activation = _activation(parts["activation"])
        return nn.Sequential(FusedIntermediate(linears[0], activation), linears[1]) if activation else None
    if {"ffn", "ffn_output", "activation"} <= parts.keys() and len(linears) == 2:  # ALBERT's
        _fuse_activation(module, "ffn", "activation")
        return None
    if isinstance(module, FusedIntermediate | FusedOutput) or len(linears) != 1:
        return None
    if parts.keys() == {"dense", "intermediate_act_fn"}:
        activation = _activation(parts["intermediate_act_fn"])
        return FusedIntermediate(linears[0], activation) if activation else None
    if parts.keys() == {"dense", "LayerNorm"} and _is_right(ADD):
        return FusedOutput(linears[0], parts["LayerNorm"])
    return None


def _fuse_activation(module: nn.Module, linear: str, function: str) -> None:
    """Have a module's layer compute the activation that follows it."""
    activation = _activation(getattr(module, function))
    if activation is not None:
        setattr(module, linear, FusedIntermediate(getattr(module, linear), activation))
        setattr(module, function, nn.Identity())


def _modernbert_attention(attention: Any, kernels: CpuKernels | None) -> MergedAttention:
    """In place of ModernBERT's, whose queries, keys and values come from one product as they are, and which rotates in
    float32: that takes longer on a CPU than all its products."""
    width = attention.Wqkv.out_features // 3
    merged = MergedAttention(attention, attention.Wqkv, [width] * 3, attention.Wo)
    merged.rotates_with = kernels
    return merged


# What gated feed-forward layers call the product of gate and input in one, the last product, and the gate's activation:
# `MergedMLP` and ModernBERT's.
GATED = (("gate_up_proj", "down_proj", "act_fn"), ("Wi", "Wo", "act"))


def _names_of_gated(module: nn.Module) -> tuple[str, str, str] | None:
    return next((names for names in GATED if all(hasattr(module, name) for name in names)), None)


def _gated(module: nn.Module) -> FusedGatedMLP | None:
    """The fused module in place of a gated layer, whose first product is divided; None for any other module."""
    names = _names_of_gated(module)
    if names is None:
        return None
    wide, down, act = (getattr(module, name) for name in names)
    if type(wide) is not nn.Linear or not _can_be(wide):
        return None
    activation = _activation(act)
    if activation is None:
        return None
    gate, up = (PrepackedLinear(half) for half in _halves(wide))
    return FusedGatedMLP(gate, up, down, activation)


def _halves(linear: nn.Linear) -> list[nn.Linear]:
    """The first and the second half of the outputs; the weights are not copied."""
    halves = []
    for start in (0, linear.out_features // 2):
        half = nn.Linear(linear.in_features, linear.out_features // 2, bias=linear.bias is not None, device="meta")
        for name, parameter in linear.named_parameters():
            rows = parameter.detach()[start : start + half.out_features]
            setattr(half, name, nn.Parameter(rows, requires_grad=False))
        halves.append(half)
    return halves


def _activation(computes: Callable[[Tensor], Tensor]) -> str | None:
    """What FUSED calls a function, or that which a module computes, if it can be used here: found out by trying.

    transformers has a class for nearly every name of a function, and several names for some.
    """
    values = torch.linspace(-20, 20, 801)
    try:
        computed = computes(values)
        same = (
            name
            for name, (_, _, function) in FUSED.items()
            if torch.allclose(computed, function(values), rtol=1e-5, atol=1e-6)
        )
        found = next(same, None)
    except Exception:
        return None
    return found if found is not None and _is_right(found) else None


@torch.no_grad()
def prepack(model: Model, *, timed: bool = True) -> int:
    """Exchange the linear layers of a model that is on a CPU and in bfloat16, and what can be computed with them.

    Layer by layer, so that the weights are never in memory twice, and each at once wherever it is: should memory end on
    the way, the model runs as it is then, and whoever shares its network or loads it again has a whole one. The model's
    `layers` stay: only what is within them is exchanged.

    Args:
        timed: whether what computes a step may depend on how long it takes.

    Returns:
        How many of torch's linear layers are gone.
    """
    gone = _exchange(model, _gated)
    gone += _exchange(model, lambda module: prepacked(module) if type(module) is nn.Linear else None)
    if gone:
        _exchange(model, partial(_fused, kernels=cpu_kernels() if timed else None))
    return gone


def _exchange(model: Model, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Exchange each module below a model's for what is made of it, where that is another; returns how many were."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent, name, child in places_within(model.modules):
        places.setdefault(child, []).append((parent, name))
    count = 0
    while places:  # from the end, where the children are: what has been exchanged is not held any longer
        module, where = places.popitem()
        made = make(module)
        if made is not None and made is not module:
            count += 1
            for parent, name in where:
                setattr(parent, name, made.eval())
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
        following: one of FUSED, or ADD, or "none".
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, other = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 24, 64), (48, 64), (48,), (2, 24, 48))
    )
    linear = nn.Linear(64, 48, device="meta")
    linear.weight, linear.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    product = F.linear(hidden.float(), weight.float(), bias.float())
    wanted = FUSED[following][2](product) if following in FUSED else product
    if following == ADD:
        wanted = product + other
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        packed = PrepackedLinear(linear)
        out = packed.plus(hidden, other) if following == ADD else packed.then(following, hidden)
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
