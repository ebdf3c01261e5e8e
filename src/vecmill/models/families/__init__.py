"""The families that are served, by task and the `model_type` in their config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from vecmill.core.types import Task
from vecmill.models.bert import BertEmbedder
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.cross_encoder import CrossEncoder
from vecmill.models.nomic_bert import NomicBertEmbedder
from vecmill.models.nv_embed import NVEmbedder
from vecmill.models.packing import PackedBatch
from vecmill.models.qwen3 import Qwen3Embedder
from vecmill.models.qwen3_reranker import Qwen3Reranker
from vecmill.models.rerank_prompt import check_form
from vecmill.models.weights import Target


class Model(Protocol):
    """A loaded model."""

    @property
    def width(self) -> int:
        """Values per row: the dimensions of a vector, or 1 for a reranker's logit."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """All that holds weights."""
        ...

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The repeated transformer blocks, in the order they run, all of one class."""
        ...

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, width) float32, not normalised, in packed order."""
        ...


class Family(Protocol):
    """A class of models."""

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Model: ...


FAMILIES: Mapping[Task, Mapping[str, Family]] = {
    Task.EMBED: {
        "bert": BertEmbedder,
        "xlm-roberta": BertEmbedder,
        "nomic_bert": NomicBertEmbedder,
        "qwen3": Qwen3Embedder,
        "nvembed": NVEmbedder,
    },
    Task.RERANK: {
        "bert": CrossEncoder,
        "xlm-roberta": CrossEncoder,
        "qwen3": Qwen3Reranker,
    },
}


def family(checkpoint: Checkpoint) -> Family:
    """The class that runs a checkpoint: one for each family whose config.json is read.

    Raises:
        StartupError: see `check_form`.
    """
    check_form(checkpoint)
    return FAMILIES[checkpoint.task][checkpoint.model_type]
