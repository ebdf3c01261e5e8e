"""ALBERT (paraphrase-albert-*): BERT whose layers share their weights, with narrow token embeddings.

Source: Lan et al. 2019 (https://arxiv.org/abs/1909.11942).
"""

from __future__ import annotations

from collections.abc import Mapping

from vecmill.core.types import Task
from vecmill.models.config_keys import MOST_LAYERS
from vecmill.models.encoders import ENCODER_KEYS, cross_encoder, embedder
from vecmill.models.family import Family, HubModel, Positions
from vecmill.models.keys import HARMLESS, Rule, rules, whole

KEYS: Mapping[str, Rule] = {
    **ENCODER_KEYS,
    "embedding_size": whole(),
    "inner_group_num": whole(largest=MOST_LAYERS),
    "num_hidden_groups": whole(largest=MOST_LAYERS),
    "classifier_dropout_prob": HARMLESS,
    # Of Google's releases; read by nothing.
    **rules(HARMLESS, ("down_scale_factor", "gap_size", "layers_to_keep", "net_structure_type", "num_memory_blocks")),
}
BLOCKS = "encoder.albert_layer_groups"
OF_PRETRAINING = ("predictions.", "sop_classifier.")
HEAD = ("albert.pooler", "albert.pooler_activation", "classifier")

ALBERT = Family(
    model_type="albert",
    architectures=r"Albert\w+",
    tasks={
        Task.EMBED: embedder(
            "Albert", "albert.", KEYS, unused=OF_PRETRAINING, options={"add_pooling_layer": False}, blocks=BLOCKS
        ),
        Task.RERANK: cross_encoder("Albert", "albert.", KEYS, head=HEAD, types=True, blocks=BLOCKS),
    },
    positions=Positions.FROM_ZERO,
    examples=(
        HubModel("sentence-transformers/paraphrase-albert-small-v2", Task.EMBED, 11_683_584, "apache-2.0", 256, 768),
    ),
)
