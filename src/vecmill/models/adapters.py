"""An encoder with weights for several tasks (LoRA), on packed rows of any of them: jina-embeddings-v3.

Beside each weight W there are two small ones for each task, A and B, and the task's rows are multiplied with W + s B A.
That sum is not computed: x W' + s (x A') B' is the same, and the As of all tasks together are one narrow matrix, as the
Bs are. Between the two, a token's values that belong to other tasks are set to zero. So a pack may hold rows of every
task, each is run with its own adapter alone, and no vector depends on which others the pack holds.

Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685); Sturua et al. 2024 (https://arxiv.org/abs/2409.10173).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from vecmill.models.cpu_kernels import CpuKernels
from vecmill.models.family import Adapters
from vecmill.models.fused_norms import norm_of_sum
from vecmill.models.merged_projections import rotated
from vecmill.models.packed_attention import packed_attention
from vecmill.models.packing import PackedBatch


def _empty(*shape: int) -> nn.Parameter:
    """A parameter that takes no memory until its values are loaded."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _joined(parameter: Tensor) -> nn.Parameter:
    """A parameter with these values, laid out in memory as its shape says."""
    return nn.Parameter(parameter.contiguous(), requires_grad=False)


def _add_product(out: Tensor, low: Tensor, weight: Tensor) -> Tensor:
    """(1, T, outputs) plus (1, T, tasks * rank) times a weight, in place: another tensor of that size takes longer."""
    out[0].addmm_(low[0], weight.T)
    return out


class AdaptedLinear(nn.Module):
    """A linear layer and its adapters. Until they are joined, their weights have the shapes of the hub's files."""

    def __init__(self, inputs: int, outputs: int, adapters: Adapters) -> None:
        super().__init__()
        tasks, rank = len(adapters.names), adapters.rank
        self.weight, self.bias = _empty(outputs, inputs), _empty(outputs)
        self.lora_A, self.lora_B = _empty(tasks, rank, inputs), _empty(tasks, outputs, rank)
        self.plain: nn.Module
        """The layer without its adapters; from `join` on."""

    def join(self) -> None:
        """Make one matrix of the tasks' As, (tasks * rank, inputs), and one of their Bs, (outputs, tasks * rank). The
        other weights become a layer of torch's, which may be exchanged for a faster one.
        """
        outputs, inputs = self.weight.shape
        plain = nn.Linear(inputs, outputs, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        del self.weight, self.bias
        self.plain = plain
        self.lora_A = _joined(self.lora_A.flatten(0, 1))
        self.lora_B = _joined(self.lora_B.transpose(0, 1).flatten(1))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(1, T, inputs) and (1, T, tasks * rank) -> (1, T, outputs)"""
        low = F.linear(hidden, self.lora_A) * mask
        return _add_product(self.plain(hidden), low, self.lora_B)


class AdaptedEmbedding(nn.Module):
    """A table of vectors and its adapters; as AdaptedLinear."""

    def __init__(self, rows: int, width: int, adapters: Adapters) -> None:
        super().__init__()
        tasks, rank = len(adapters.names), adapters.rank
        self.weight = _empty(rows, width)
        self.lora_A, self.lora_B = _empty(tasks, rows, rank), _empty(tasks, rank, width)

    def join(self) -> None:
        """Make one table of the tasks' As, (rows, tasks * rank), and one matrix of their Bs, (width, tasks * rank)."""
        self.lora_A = _joined(self.lora_A.transpose(0, 1).flatten(1))
        self.lora_B = _joined(self.lora_B.flatten(0, 1).T)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(1, T) and (1, T, tasks * rank) -> (1, T, width)"""
        low = F.embedding(ids, self.lora_A) * mask
        return _add_product(F.embedding(ids, self.weight), low, self.lora_B)


class AdaptedEmbeddings(nn.Module):
    """Of tokens and their types, and the norm."""

    def __init__(self, embeddings: Any, adapters: Adapters) -> None:
        """Take over what `embeddings`, of transformers, is made of."""
        super().__init__()
        words, types = embeddings.word_embeddings, embeddings.token_type_embeddings
        self.word_embeddings = AdaptedEmbedding(words.num_embeddings, words.embedding_dim, adapters)
        self.token_type_embeddings = AdaptedEmbedding(types.num_embeddings, types.embedding_dim, adapters)
        self.LayerNorm: nn.Module = embeddings.LayerNorm

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """(1, T) twice and (1, T, tasks * rank) -> (1, T, width)"""
        hidden: Tensor = self.LayerNorm(self.word_embeddings(ids, mask) + self.token_type_embeddings(types, mask))
        return hidden


class AdaptedLayer(nn.Module):
    """Rotary attention and the feed-forward layer, each followed by its norm."""

    def __init__(self, layer: Any, adapters: Adapters) -> None:
        """Take over what `layer`, of transformers, is made of."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        width, inner = attention.o_proj.in_features, mlp.fc1.out_features
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.rotates_with: CpuKernels | None = None
        """What rotates queries and keys on a CPU; None: torch's operations."""
        self.qkv_proj = AdaptedLinear(width, 3 * width, adapters)
        self.o_proj = AdaptedLinear(width, width, adapters)
        self.fc1, self.fc2 = AdaptedLinear(width, inner, adapters), AdaptedLinear(inner, width, adapters)
        self.activation: nn.Module = mlp.activation_fn
        self.post_attention_layernorm: nn.Module = layer.post_attention_layernorm
        self.post_mlp_layernorm: nn.Module = layer.post_mlp_layernorm

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor,
        packed_batch: PackedBatch | None,
    ) -> Tensor:
        """(1, T, width) -> (1, T, width)"""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv_proj(hidden, mask).chunk(3, dim=-1)
        )
        query, key = (rotated(each, *position_embeddings, self.rotates_with) for each in (query, key))
        attended, _ = packed_attention(
            self,
            query,
            key,
            value,
            None,
            packed_batch=packed_batch,  # type: ignore[arg-type]  # None while it is compiled
            scaling=self.scaling,
        )
        hidden = norm_of_sum(self.post_attention_layernorm, self.o_proj(attended.flatten(2), mask), hidden)
        fed: Tensor = self.fc2(self.activation(self.fc1(hidden, mask)), mask)
        return norm_of_sum(self.post_mlp_layernorm, fed, hidden)


class AdaptedEncoder(nn.Module):
    """transformers' network of jina-embeddings-v3 together with the adapters, which transformers' class lacks."""

    task_of_column: Tensor
    """(tasks * rank,) int32"""

    def __init__(self, model: Any, adapters: Adapters) -> None:
        """Take over what `model`, of transformers, is made of. To be called before the weights are there."""
        super().__init__()
        self.embeddings = AdaptedEmbeddings(model.embeddings, adapters)
        self.rotary_emb: nn.Module = model.rotary_emb
        self.layers = nn.ModuleList(AdaptedLayer(layer, adapters) for layer in model.layers)
        self._scaling = adapters.scaling
        columns = torch.arange(len(adapters.names), dtype=torch.int32).repeat_interleave(adapters.rank)
        self.register_buffer("task_of_column", columns, persistent=False)

    def join_adapters(self) -> None:
        """To be called once the weights are there."""
        for module in self.modules():
            if isinstance(module, AdaptedLinear | AdaptedEmbedding):
                module.join()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, packed_batch: PackedBatch
    ) -> BaseModelOutput:
        """(1, T) token ids, positions and types to (1, T, width)."""
        dtype = self.embeddings.word_embeddings.weight.dtype
        mask = (packed_batch.adapters[None, :, None] == self.task_of_column).to(dtype) * self._scaling
        hidden: Tensor = self.embeddings(input_ids, token_type_ids, mask)
        turns = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=turns, mask=mask, packed_batch=packed_batch)
        return BaseModelOutput(last_hidden_state=hidden)
