"""nomic-embed-text-v1.5 and other nomic BERTs: rotary positions, SwiGLU, post-norm, mean pooling.

Source: Nussbaum et al. 2024 (https://arxiv.org/abs/2402.01613); https://huggingface.co/nomic-ai/nomic-embed-text-v1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import NomicBertConfig, NomicBertModel

from vecmill.models.bert import encode
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.config_keys import NOMIC_KEYS
from vecmill.models.packing import PackedBatch
from vecmill.models.pooling import pool
from vecmill.models.weights import Target, load_weights, make_config

PARTS = {
    "attn.Wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.out_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.fc11.weight": ("mlp.up_proj.weight",),
    "mlp.fc12.weight": ("mlp.gate_proj.weight",),
    "mlp.fc2.weight": ("mlp.down_proj.weight",),
    "norm1.weight": ("post_attention_layernorm.weight",),
    "norm1.bias": ("post_attention_layernorm.bias",),
    "norm2.weight": ("post_mlp_layernorm.weight",),
    "norm2.bias": ("post_mlp_layernorm.bias",),
}
UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


class NomicBertEmbedder:
    """A packed forward pass."""

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        """Load the weights. Raises StartupError where any is missing or the config asks for what is not done here."""
        config = read_config(checkpoint)
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self._pooling = checkpoint.require_pooling()
        self._encoder = load_weights(NomicBertModel, checkpoint, config, target, _rename, add_pooling_layer=False)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self._encoder,)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return tuple(cast(Any, self._encoder).layers)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, width) float32, pooled and not normalised, in packed order."""
        return pool(encode(self._encoder, packed, None, use_flash_attn), packed, self._pooling)


def read_config(checkpoint: Checkpoint) -> NomicBertConfig:
    """The native configuration from the hub's keys or from the native ones.

    Raises:
        StartupError: the class does not accept what it says.
    """
    said = checkpoint.architecture
    native = {NOMIC_KEYS.get(key, key): value for key, value in said.items()}
    if "rotary_emb_base" in said and said.get("rope_parameters") is None:
        # Rotary scaling beyond the trained length would make a vector depend on the longest text of its batch. Texts
        # are cut at that length instead, so the plain rotation is right.
        native["rope_parameters"] = {"rope_type": "default", "rope_theta": float(said["rotary_emb_base"])}
    return make_config(NomicBertConfig, checkpoint, {**native, "max_position_embeddings": checkpoint.positions})


def _rename(name: str) -> Sequence[str]:
    """The hub's names or the native ones."""
    name = name.removeprefix("nomic_bert.")
    if name.startswith(UNUSED):
        return ()
    if name.startswith("emb_ln."):
        return (name.replace("emb_ln.", "embeddings.LayerNorm."),)
    if name.startswith("encoder.layers."):
        _, _, layer, part = name.split(".", 3)
        return tuple(f"layers.{layer}.{native}" for native in PARTS.get(part, (part,)))
    return (name,)
