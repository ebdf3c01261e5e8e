"""Norms in bfloat16 on a CPU, each in fewer passes over its values than torch's and transformers' take.

`prepacked_linears` exchanges those of a model for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecmill.models.cpu_kernels import STEP, CpuKernels, in_one_thread


class FusedRMSNorm(nn.Module):
    """Root mean square norm in bfloat16, with sums and the scale in float32. Rounded as transformers' own."""

    def __init__(self, weight: Tensor, epsilon: float, kernels: CpuKernels | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.epsilon = epsilon
        self.kernels = kernels if len(weight) % STEP == 0 else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., width) -> (..., width)"""
        kernels = in_one_thread(self.kernels)
        if kernels is not None:
            return kernels.rms_norm(hidden_states, self.weight, self.epsilon)
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square_().div_(hidden_states.shape[-1]).add_(self.epsilon))
        # With the scale as a sum of two, nothing of the hidden states' size is made in float32, and their product with
        # it is rounded once.
        high = scale.bfloat16()
        low = (scale - high).bfloat16()
        return torch.addcmul(hidden_states * low, hidden_states, high).mul_(self.weight)


class FusedLayerNorm(nn.Module):
    """torch's in bfloat16, in one pass over the values."""

    def __init__(self, norm: nn.LayerNorm, kernels: CpuKernels) -> None:
        """Take over its weights, of a width that is a multiple of STEP."""
        super().__init__()
        self.weight, self.bias, self.epsilon, self.kernels = norm.weight, norm.bias, norm.eps, kernels

    def forward(self, hidden_states: Tensor, other: Tensor | None = None) -> Tensor:
        """(..., width) -> (..., width), of the sum with `other`."""
        kernels = in_one_thread(self.kernels)
        if kernels is not None:
            return kernels.layer_norm(hidden_states, self.weight, self.bias, self.epsilon, other)
        hidden_states = hidden_states if other is None else hidden_states + other
        return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.epsilon)

    @property
    def adds_faster(self) -> bool:
        """Whether in this thread adding takes less time here than with the product before."""
        return in_one_thread(self.kernels) is not None


def norm_of_sum(norm: nn.Module, hidden: Tensor, other: Tensor) -> Tensor:
    """What a norm gives for a sum, of (..., width) each."""
    normed: Tensor = norm(hidden, other) if isinstance(norm, FusedLayerNorm) else norm(hidden + other)
    return normed


class FusedGemmaRMSNorm(nn.Module):
    """Gemma's in bfloat16, in one pass over the values: it multiplies with 1 + weight before it rounds."""

    def __init__(self, norm: nn.Module, weight: Tensor, epsilon: float, kernels: CpuKernels) -> None:
        """`norm`: what it stands for, and runs where a pass has several threads; its weights have a width that is a
        multiple of STEP."""
        super().__init__()
        self.weight, self.epsilon, self.kernels = weight, epsilon, kernels
        self._plain = (norm,)  # not a module within this one: it has the same weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., width) -> (..., width)"""
        kernels = in_one_thread(self.kernels)
        if kernels is None:
            normed: Tensor = self._plain[0](hidden_states)
            return normed
        return kernels.rms_norm(hidden_states, self.weight, self.epsilon, offset=1.0, rounds=False)
