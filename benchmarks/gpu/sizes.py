"""How much benchmarks/gpu.py measures: the hub's models at full size, or tiny ones that show that it works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.model_shapes import BERT_BASE, CUDA, NV_EMBED_V2, QUICK, QWEN3_0_6B, QWEN3_4B, Shape


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
    """That vecmill should take for the texts; their number follows from it."""
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
    rounds=2,
    seconds=0.0,
    matmul_size=QUICK.matmul_size,
    copy_bytes=QUICK.copy_bytes,
    compile_backend="eager",  # traced by dynamo as on a GPU, without a compiler
)
