"""How large the measured models are: as on the hub on CUDA, less on a CPU, tiny for a smoke run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shape = Mapping[str, Any]
"""A config.json."""

MINILM: Shape = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
BERT_BASE: Shape = {
    **MINILM,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
}
MPNET_BASE: Shape = {**BERT_BASE, "vocab_size": 30527, "max_position_embeddings": 514, "layer_norm_eps": 1e-5}
NOMIC: Shape = {
    "vocab_size": 30528,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 2048,
}
QWEN3_0_6B: Shape = {
    "vocab_size": 151669,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
}
QWEN3_4B: Shape = {
    **QWEN3_0_6B,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
}
NV_EMBED_V2: Shape = {
    "hidden_size": 4096,
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    },
    "latent_attention_config": {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 4096},
}


@dataclass(frozen=True)
class Sizes:
    """What one run measures."""

    latent_width: int
    """Of NV-Embed's latent attention; its 8 heads are as wide."""
    latents: int
    latent_tokens: Sequence[int]
    """Per forward."""
    reranker: Shape
    documents: int
    document_tokens: int
    encoders: Mapping[str, tuple[str, Shape]]
    """Name to kind and shape, for packed against padded."""
    texts: int
    whole: Mapping[str, tuple[str, Shape]]
    """As `encoders`, for the share of the matmul rate."""
    whole_tokens: Sequence[int]
    merged: Mapping[str, tuple[str, Shape]]
    """As `encoders`, for merged projections against separate ones: their backbones alone."""
    merged_tokens: Sequence[int]
    family_texts: int
    """Of each of FAMILY_SHAPES."""
    tiny_families: bool
    load_gb: float
    load_shape: Shape
    """Its layers are repeated until the checkpoint is large enough."""
    matmul_size: int
    copy_bytes: int


def _few_layers(shape: Shape, layers: int) -> Shape:
    return {**shape, "text_config": {**shape["text_config"], "num_hidden_layers": layers}}


CUDA = Sizes(
    latent_width=4096,
    latents=512,
    latent_tokens=(64, 1024),
    reranker=QWEN3_4B,
    documents=32,
    document_tokens=200,
    encoders={
        "BERT-base": ("bert", BERT_BASE),
        "MPNet-base": ("mpnet", MPNET_BASE),
        "Qwen3-0.6B": ("qwen3", QWEN3_0_6B),
    },
    texts=2048,
    whole={"Qwen3-Embedding-4B": ("qwen3", QWEN3_4B), "NV-Embed-v2": ("nvembed", NV_EMBED_V2)},
    whole_tokens=(64, 512, 4096, 16384),
    merged={
        "Qwen3-0.6B": ("qwen3", QWEN3_0_6B),
        "nomic-embed": ("nomic_bert", NOMIC),
        "NV-Embed, 8 layers": ("nvembed", _few_layers(NV_EMBED_V2, 8)),
    },
    merged_tokens=(16, 512, 4096),
    family_texts=512,
    tiny_families=False,
    load_gb=8,
    load_shape=QWEN3_4B,
    matmul_size=8192,
    copy_bytes=2**30,
)
CPU = Sizes(
    latent_width=1024,
    latents=512,
    latent_tokens=(64, 1024),
    reranker={**QWEN3_0_6B, "num_hidden_layers": 4},
    documents=32,
    document_tokens=200,
    encoders={
        "MiniLM-L6": ("bert", MINILM),
        "MPNet-base, 2 layers": ("mpnet", {**MPNET_BASE, "num_hidden_layers": 2}),
    },
    texts=256,
    whole={},
    whole_tokens=(),
    merged={
        "Qwen3-0.6B, 4 layers": ("qwen3", {**QWEN3_0_6B, "num_hidden_layers": 4, "vocab_size": 1000}),
        "nomic-embed, 4 layers": ("nomic_bert", {**NOMIC, "num_hidden_layers": 4}),
        "NV-Embed, 1 layer": ("nvembed", _few_layers(NV_EMBED_V2, 1)),
    },
    merged_tokens=(16, 512),
    family_texts=48,
    tiny_families=False,
    load_gb=4,
    load_shape=QWEN3_4B,
    matmul_size=2048,
    copy_bytes=2**28,
)
_TINY = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
_TINY_BERT: Shape = {**MINILM, **_TINY, "num_attention_heads": 4}
_TINY_MPNET: Shape = {**MPNET_BASE, **_TINY, "num_attention_heads": 4}
_TINY_QWEN3: Shape = {**QWEN3_0_6B, **_TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_TINY_NV_EMBED: Shape = {
    "hidden_size": 64,
    "text_config": {**NV_EMBED_V2["text_config"], **_TINY, "num_attention_heads": 4, "num_key_value_heads": 2},
    "latent_attention_config": {"num_latents_value": 16, "num_cross_heads": 8, "cross_dim_head": 64},
}
QUICK = Sizes(
    latent_width=64,
    latents=16,
    latent_tokens=(16, 64),
    reranker=_TINY_QWEN3,
    documents=5,
    document_tokens=20,
    encoders={
        "tiny BERT": ("bert", _TINY_BERT),
        "tiny MPNet": ("mpnet", _TINY_MPNET),
        "tiny Qwen3": ("qwen3", _TINY_QWEN3),
    },
    texts=40,
    whole={"tiny Qwen3": ("qwen3", _TINY_QWEN3), "tiny NV-Embed": ("nvembed", _TINY_NV_EMBED)},
    whole_tokens=(64, 600),
    merged={
        "tiny Qwen3": ("qwen3", _TINY_QWEN3),
        "tiny nomic": ("nomic_bert", {**NOMIC, **_TINY, "num_attention_heads": 4}),
        "tiny NV-Embed": ("nvembed", _TINY_NV_EMBED),
    },
    merged_tokens=(16, 64),
    family_texts=12,
    tiny_families=True,
    load_gb=0.064,
    load_shape={**_TINY_QWEN3, "hidden_size": 512, "intermediate_size": 2048},
    matmul_size=128,
    copy_bytes=2**20,
)
