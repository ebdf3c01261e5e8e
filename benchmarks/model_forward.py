"""A model's forward passes over packs of rows, and how much work they are.

Imports nothing of the server's settings: a GPU machine has torch and transformers and often not much else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from benchmarks.model_builds import matmul_parameters
from benchmarks.model_shapes import Shape
from benchmarks.model_workloads import attended, computed_tokens
from torch import Tensor

from vecmill.core.types import Row
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, pack

CAUSAL = {"qwen3", "qwen3-reranker"}


def run_model(model: Model, packs: Sequence[Sequence[Row]], device: torch.device) -> Tensor:
    """(N, width) on the CPU in the rows' order: what the server's engine does for each batch."""
    parts = []
    dtype = next(model.modules[0].parameters()).dtype
    for rows in packs:
        packed = pack(rows, device, attention=Attention.on(device, dtype))
        answers = model.forward(packed).cpu()
        restored = torch.empty_like(answers)
        restored[torch.tensor(packed.order)] = answers
        parts.append(restored)
    return torch.cat(parts)


def operations(kind: str, model: Model, shape: Shape, packs: Sequence[Sequence[Row]]) -> float:
    """Floating-point operations of the packs' forward passes: linear layers and attention."""
    parameters = matmul_parameters(model.modules)
    head_width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    per_pair: int = 4 * shape["num_hidden_layers"] * shape["num_attention_heads"] * head_width
    return sum(
        2.0 * parameters * computed_tokens(rows) + per_pair * attended(rows, causal=kind in CAUSAL) for rows in packs
    )
